"""Runs whose memory ends where a test says, alone or as one of two processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adapter_runs import KillAt
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.strategies.choice import strategy_named
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import newest_verified
from qlora_pl.training.watching.monitoring import RunMetrics


class Shortage(NamedTuple):
    """Where memory runs out."""

    batch: int
    """Micro-batch of the run, from 0."""
    phase: str = "forward"
    """``forward`` of the first layer, or ``backward``, when the last layer's is done."""
    times: int = 1
    """Tries in a row that fail."""
    rank: int = 0


class Shortages(Callback):
    """Raises what CUDA would, in the middle of chosen tries; and what it had found there."""

    def __init__(self, *shortages: Shortage) -> None:
        self.shortages = shortages
        self.raised: list[tuple[int, str]] = []
        self.partial_gradients: list[int] = []
        """Parameters that had a gradient when a backward pass failed."""
        self._left = {shortage: shortage.times for shortage in shortages}
        self._now: list[Shortage] = []

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.module = module
        first, *_ = find_layers(module)
        first.register_forward_hook(self._forward)
        self._done = 0

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        here = [s for s in self.shortages if (s.batch, s.rank) == (self._done, trainer.global_rank)]
        self._now = here
        self._done += 1

    def _forward(self, layer: Any, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        for shortage in self._now:
            if shortage.phase == "forward":
                self._raise(shortage)
            elif hidden.requires_grad:
                hidden.register_hook(lambda gradient, shortage=shortage: self._raise(shortage))

    def _raise(self, shortage: Shortage) -> None:
        if not self._left[shortage]:
            return
        self._left[shortage] -= 1
        self.raised.append((shortage.batch, shortage.phase))
        if shortage.phase == "backward":
            trained = self.module.trained_tensors().values()
            self.partial_gradients.append(sum(p.grad is not None for p in trained))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def find_layers(module: Any) -> list[Any]:
    """The layers of a model, of its decoder where it has two halves."""
    lists = [m for m in module.model.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists[-1:] + lists[:1], key=len)) if lists else []


class Plan(Callback):
    """Cuts from given micro-batches of the run on, as if it had been known."""

    def __init__(self, pieces: Mapping[tuple[int, int], int]) -> None:
        self.pieces = pieces
        """By rank and micro-batch."""
        self._done = 0

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        number = self.pieces.get((trainer.global_rank, self._done))
        if number is not None:
            module.runner.num_pieces = number
        self._done += 1


def train(
    folder: Path,
    base: Path,
    rows: Path,
    *callbacks: Callback,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    compute: str = "float32",
    **model: Any,
) -> QLoRAModule:
    """Eight rows a step in two micro-batches, some of them short; goes on from a checkpoint.

    It saves at its end; one that is to be killed, at every step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(3)
    settings: dict[str, Any] = {
        "quantization": QuantizationConfig(compute_dtype=compute),  # type: ignore[arg-type]
        "lora": LoRAConfig(r=4, dropout=dropout),
        "optimizer": OptimizerConfig(name="sgd", lr=1.0),  # AdamW would divide small errors away
        "gradient_checkpointing": False,
    }
    module = QLoRAModule(str(base), **settings | model)
    module_data = InstructionDataModule(
        rows,
        **{"template": "guanaco", "val_size": 2, "batch_size": 4, "max_length": 64} | (data or {}),
    )
    chosen = {
        "max_steps": 3,
        "accumulate_grad_batches": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 1,
        "limit_val_batches": 1,
        "gradient_clip_val": 0.3,
    } | dict(trainer or {})
    chosen["strategy"] = strategy_named("auto" if chosen["devices"] == 1 else "ddp")
    save_every = 1 if any(isinstance(callback, KillAt) for callback in callbacks) else 100
    run = Trainer(
        default_root_dir=folder,
        callbacks=[RunMetrics(), AdapterCheckpoint(every_n_steps=save_every), *callbacks],
        **chosen,
    )
    run.fit(module, module_data, ckpt_path=newest_verified(folder))
    return module


def trained(module: QLoRAModule) -> dict[str, Tensor]:
    """A copy of what was trained."""
    return {name: p.detach().clone() for name, p in module.trained_tensors().items()}


def metrics(folder: Path) -> dict[str, Any]:
    """What the run wrote of itself."""
    numbers: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return numbers


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of two adapters."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
