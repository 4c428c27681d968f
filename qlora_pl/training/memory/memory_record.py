"""``MemoryRecord``: what a run's memory was planned to be beside what it came to.

One line in the log, and one in ``plan_error.csv`` in the folder of all runs, so that the plan is
held against everything that is ever trained. Nothing of a run depends on it, and what goes wrong in
it is a line in the log.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from qlora_pl.data.batches.batching import TrainingBatches
from qlora_pl.files import append_row
from qlora_pl.planning.memory.memory_plan import COMPONENTS
from qlora_pl.training.memory.device_memory import GIB
from qlora_pl.training.memory.held_bytes import (
    MODEL_PARTS,
    held_by_gradients,
    held_by_model,
    held_by_optimizer,
)
from qlora_pl.training.memory.planned_memory import RunPlanner

logger = logging.getLogger(__name__)

FILE = "plan_error.csv"
COUNTED = (*MODEL_PARTS, "gradients", "optimizer_state", "paged_optimizer_state")
"""The components whose tensors can be counted."""
COLUMNS = (
    *("time", "run", "base", "device", "processes", "strategy"),
    *("batch_size", "tokens_per_row", "gradient_checkpointing"),
    *(f"planned_{name}" for name in COMPONENTS),
    *(f"counted_{name}" for name in COUNTED),
    *("planned_allocated", "peak_allocated", "peak_reserved", "error_ratio"),
)
"""``planned_allocated`` is what torch's allocator counts, and ``error_ratio`` what it is more or
less than the peak, as a share of that; both peaks are of the largest batch and the first step."""
MEBIBYTE = 2**20


class MemoryRecord(Callback):
    """Plans before the first step, counts during it, and writes both down after it.

    With several processes the numbers are the largest of all, each for itself.

    Args:
        folder: Of all runs, where ``plan_error.csv`` is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.planned: dict[str, int] = {}
        """Bytes by component, and ``allocated``."""
        self.counted: dict[str, int] = {}
        """The same of what there is, and on CUDA ``peak_allocated`` and ``peak_reserved``."""
        self._facts: dict[str, Any] = {}
        self._last_step = -1
        self._is_done = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the epoch's largest batch, and count what the model holds; peaks begin here."""
        self.planned, self.counted, self._is_done = {}, {}, False
        self._last_step = trainer.global_step
        self._carefully(lambda: self._plan(trainer, pl_module))
        self._carefully(lambda: self.counted.update(held_by_model(_model(pl_module))))
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Count the gradients of the first step."""
        if not self._is_done:
            trained = _any(pl_module).trained_tensors().values()
            self._carefully(lambda: self.counted.update(gradients=held_by_gradients(trained)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write everything down when the first step has been taken."""
        step = _any(pl_module).last_step
        if self._is_done or trainer.global_step == self._last_step or step.is_skipped:
            return
        self._is_done = True
        self._carefully(lambda: self._count_after_step(trainer))
        self._take_largest(trainer)
        if trainer.is_global_zero:
            self._carefully(self._write)

    # -- numbers ---------------------------------------------------------------------------------

    def _plan(self, trainer: Trainer, module: Any) -> None:
        batches = getattr(trainer.train_dataloader, "dataset", None)
        if not isinstance(batches, TrainingBatches):
            return
        batch = batches[batches.largest_key(trainer.current_epoch)]
        lines, width = batch["input_ids"].shape
        strategy: Any = trainer.strategy
        is_shared = getattr(strategy, "shards_parameters", False)
        self._facts = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": trainer.default_root_dir,
            "base": module.model_name_or_path,
            "device": _device_name(strategy.root_device),
            "processes": trainer.world_size,
            "strategy": "fsdp2" if is_shared else "ddp" if trainer.world_size > 1 else "one",
            "batch_size": lines,
            "tokens_per_row": width,
            "gradient_checkpointing": str(module.gradient_checkpointing).lower(),
        }
        plan = RunPlanner(trainer, module).of(batch)
        # At the fullest moment a step may hold two sets of gradients; what is counted is one.
        at_step = plan.moments["the optimizer's step"]
        self.planned = {**plan.components, "gradients": at_step["gradients"]}
        self.planned["allocated"] = plan.allocated

    def _count_after_step(self, trainer: Trainer) -> None:
        state, paged = held_by_optimizer(trainer.optimizers[0])
        self.counted |= {"optimizer_state": state, "paged_optimizer_state": paged}
        device = trainer.strategy.root_device
        if device.type == "cuda":
            self.counted["peak_allocated"] = torch.cuda.max_memory_allocated(device)
            self.counted["peak_reserved"] = torch.cuda.max_memory_reserved(device)

    def _take_largest(self, trainer: Trainer) -> None:
        """All ranks together, whatever has become of one's own numbers."""
        if trainer.world_size == 1:
            return
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, (self.planned, self.counted))
        self.planned, self.counted = (
            {name: max(own.get(name, 0) for own in ranks) for name in set().union(*ranks)}
            for ranks in zip(*gathered, strict=True)
        )

    # -- where they go ---------------------------------------------------------------------------

    def _write(self) -> None:
        if not self.planned:
            return
        logger.info("%s", self.in_words())
        row: dict[str, Any] = dict(self._facts)
        row |= {f"planned_{name}": self.planned[name] for name in COMPONENTS}
        row |= {f"counted_{name}": self.counted.get(name) for name in COUNTED}
        row |= {name: self.counted.get(name) for name in ("peak_allocated", "peak_reserved")}
        row["planned_allocated"] = self.planned["allocated"]
        if peak := self.counted.get("peak_allocated"):
            row["error_ratio"] = round(self.planned["allocated"] / peak - 1, 5)
        append_row(self.folder / FILE, in_csv(COLUMNS), in_csv([row.get(c) for c in COLUMNS]))

    def in_words(self) -> str:
        """Every component that was counted, and the peak, as a sentence."""
        parts = [
            f"{COMPONENTS[name]} {_mib(self.planned[name])}/{_mib(self.counted[name])}"
            for name in COUNTED
            if name in self.counted and (self.planned[name] or self.counted[name])
        ]
        said = f"memory, planned/counted in MiB: {', '.join(parts)}"
        planned = self.planned["allocated"] / GIB
        if peak := self.counted.get("peak_allocated"):
            reserved = self.counted["peak_reserved"]
            return (
                f"{said}; the peak was planned at {planned:.2f} GiB and came to "
                f"{peak / GIB:.2f} ({self.planned['allocated'] / peak - 1:+.1%}), for which the "
                f"allocator reserved {reserved / GIB:.2f} ({reserved / peak:.2f} times as much)."
            )
        return f"{said}; the peak is planned at {planned:.2f} GiB, and not counted on this device."

    @staticmethod
    def _carefully(act: Callable[[], Any]) -> None:
        """Do what a run must not end by."""
        try:
            act()
        except Exception as error:  # whatever it is, the run goes on
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("The run's memory was not held against its plan: %s", reason)


def in_csv(values: Any) -> str:
    """One line of a table; None is an empty cell."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(
        ["" if value is None else value for value in values]
    )
    return line.getvalue()


def _mib(size: int) -> str:
    return f"{size / MEBIBYTE:,.1f}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _model(module: Any) -> Any:
    return module.model


def _any(module: Any) -> Any:
    return module
