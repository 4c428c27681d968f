"""Small runs of which something is auto; as a program, one of several that talk over gloo."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from memory_runs import find_layers, train

from qlora_pl.training.memory.auto_batch import AutoBatch

GIB = 2**30
LARGE = 64.0
"""GiB that any of these runs fits into."""
ROWS_OF_A_STEP = 8


class RoomFor(AutoBatch):
    """Has room for so many rows in a forward pass, whatever the plan says.

    Raises what CUDA would: real code meets a shortage that only looks real, as nothing but a kill
    ends memory on a CPU.
    """

    def __init__(self, rows: int, **settings: Any) -> None:
        super().__init__(LARGE, tries_on_cpu=True, **settings)
        self.rows = rows
        self.tried: list[tuple[int, bool]] = []

    def _settle(self) -> None:
        first, *_ = find_layers(self._module)
        hook = first.register_forward_pre_hook(self._look)
        super()._settle()
        hook.remove()

    def _look(self, layer: Any, inputs: Any) -> None:
        rows = inputs[0].shape[0]
        self.tried.append((rows, self._module.gradient_checkpointing))
        if rows > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def auto_run(
    folder: Path,
    base: Path,
    rows: Path,
    *callbacks: Callback,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    **model: Any,
) -> Any:
    """Three steps of eight rows; the module with its trainer."""
    chosen = {"batch_size": "auto", "global_batch_size": ROWS_OF_A_STEP, "max_length": 64}
    return train(
        folder,
        base,
        rows,
        *callbacks,
        data=chosen | dict(data or {}),
        trainer={"accumulate_grad_batches": 1} | dict(trainer or {}),
        **model,
    )


def as_rank(settings: dict[str, Any]) -> None:
    """One process: its memory by its rank, and what became of the choice."""
    rank = int(os.environ["RANK"])
    choice = AutoBatch(settings["memory_gib"][rank])
    if settings.get("rows"):
        choice = RoomFor(settings["rows"][rank])
    folder = Path(settings["folder"])
    module = auto_run(
        folder,
        Path(settings["base"]),
        Path(settings["rows_file"]),
        choice,
        trainer={"devices": len(settings["memory_gib"])},
    )
    found = {
        "batch_size": module.trainer.datamodule.batch_size,
        "accumulation": module.trainer.accumulate_grad_batches,
    }
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    as_rank(json.loads(sys.argv[1]))
