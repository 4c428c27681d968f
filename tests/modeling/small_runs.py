"""Small whole runs over a base in any quantisation, in this process, which a test may kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapter_runs import KillAt, make_data, one_thread  # noqa: F401 (for files that import it)
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import newest_verified
from qlora_pl.training.watching.monitoring import RunMetrics


def make_trainer(folder: Path, *callbacks: Callback, **changes: Any) -> Trainer:
    """A quiet trainer of three steps on the CPU."""
    settings: dict[str, Any] = {
        "max_steps": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 1,  # an evaluation before the first step
    }
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings | changes)


def fit(
    folder: Path,
    base: Path,
    rows: Path,
    kill_at: int | None = None,
    callbacks: Sequence[Callback] = (),
    lora: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    is_saved_often: bool = False,
    **quantization: Any,
) -> QLoRAModule:
    """Train three steps; goes on from the newest checkpoint.

    Each step is saved if it is to be killed or ``is_saved_often``, else the last.
    """
    seed_everything(3)
    module = QLoRAModule(
        str(base),
        lora=LoRAConfig(**{"r": 4, "dropout": 0.1} | (lora or {})),
        optimizer=OptimizerConfig(**{"lr": 1.0e-2} | (optimizer or {})),
        quantization=QuantizationConfig(**{"compute_dtype": "float32"} | quantization),
        gradient_checkpointing=False,
    )
    saver = AdapterCheckpoint(every_n_steps=1 if kill_at is not None or is_saved_often else 100)
    run = make_trainer(folder, RunMetrics(), saver, *callbacks, KillAt(kill_at), **trainer or {})
    run.fit(module, make_data(rows), ckpt_path=newest_verified(folder))
    return module


def make_row() -> torch.Tensor:
    return torch.arange(5, 21).unsqueeze(0)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=make_row(), use_cache=False).logits
    return result
