"""Trains over drawn rows, by the module and the trainer of every run, with a clock beside them."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_pl.benching.device import chosen_device, limit_memory
from qlora_pl.benching.rows import DrawnData
from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.benching.timer import StepTimer
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig

ALPHA = 16.0


def settings_of(workload: Workload) -> dict[str, Any]:
    """What a ``QLoRAModule`` is given for a workload; a step that does not fit is not split."""
    return {
        "quantization": QuantizationConfig(
            quant_type=workload.quant_type,
            double_quant=workload.double_quant if workload.is_four_bits else None,
            compute_dtype=workload.compute_dtype,
            cache=False,
        ),
        "lora": LoRAConfig(
            r=workload.r, alpha=ALPHA, dropout=workload.dropout, dtype=workload.adapter_dtype
        ),
        "optimizer": OptimizerConfig(name=workload.optimizer),  # type: ignore[arg-type]
        "gradient_checkpointing": workload.checkpointing == "all",
        "attn_implementation": workload.attention,
        "on_oom": "stop",
    }


def train_module(
    module: QLoRAModule, rows: EncodedRows, workload: Workload, timing: Timing
) -> StepTimer:
    """Train a module over rows in a workload's batches, and time it.

    Args:
        module: Its base is named by a folder, or drawn.
        rows: At least as many as the steps take.
        workload: How they are trained on.
        timing: Which steps are timed.
    """
    device = chosen_device(workload)
    limit_memory(workload, device)
    timer = StepTimer(timing)
    with _seeded(workload.seed), tempfile.TemporaryDirectory() as temporary:
        trainer = _trainer(workload, timing, timer, device, temporary)
        trainer.fit(module, DrawnData(rows, workload))
    return timer


def _trainer(
    workload: Workload, timing: Timing, timer: StepTimer, device: torch.device, folder: str
) -> Any:
    from qlora_pl.cli import TRAINER_DEFAULTS  # slow to import
    from qlora_pl.training.trainer_settings import RunTrainer

    hush_lightning()
    settings: dict[str, Any] = TRAINER_DEFAULTS | {
        "accelerator": "gpu" if device.type == "cuda" else "cpu",
        "devices": 1,
        "max_steps": timing.num_steps,
        "max_epochs": -1,
        "accumulate_grad_batches": workload.accumulation,
        # As on the other side of a comparison: nothing but training.
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "default_root_dir": folder,
        "callbacks": [timer],
    }
    return RunTrainer(**settings)


def hush_lightning() -> None:
    """Let Lightning speak only when something is wrong; importing it undoes this."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """As ``seed_everything`` leaves a run, and afterwards as it was."""
    from lightning.pytorch import seed_everything

    before = os.environ.get("PL_GLOBAL_SEED")
    seed_everything(seed, verbose=False)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PL_GLOBAL_SEED", None)
        else:
            os.environ["PL_GLOBAL_SEED"] = before
