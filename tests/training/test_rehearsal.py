"""The largest batches are run before the first step, and nothing is different afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import one_thread  # noqa: F401
from lightning.pytorch import Trainer
from memory_runs import Shortage, Shortages, metrics, train, trained

from qlora_pl.data.batches.batching import BatchLayout, TrainingBatches
from qlora_pl.training.memory.rehearsal import Rehearsal

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


def write(folder: Path) -> Path:
    """Twenty short rows, and a long one at the end."""
    answers = ["yes"] * 20 + ["so " * 14]
    rows = [{"prompt": "Is it?", "response": answer} for answer in answers]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


DATA: dict[str, Any] = {"val_size": 0, "group_by_length": False, "val_sources": None}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_run_is_byte_for_byte_the_one_without(
    dropout: float, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    plain = train(tmp_path / "plain", tiny_base, rows_file, dropout=dropout)
    rehearsal = Rehearsal(on_cpu=True)
    ours = train(tmp_path / "ours", tiny_base, rows_file, rehearsal, dropout=dropout)
    assert rehearsal.num_tokens > 0
    assert all(torch.equal(t, trained(plain)[name]) for name, t in trained(ours).items())
    assert plain.last_evaluation == ours.last_evaluation
    for name in ("step", "rows", "tokens", "trained_tokens", "train/loss", "val/loss"):
        assert metrics(tmp_path / "plain")[name] == metrics(tmp_path / "ours")[name]


def test_it_is_the_batch_with_the_longest_row(tiny_base: Path, tmp_path: Path) -> None:
    """Rows are shuffled, not grouped by length: the first step would not have shown it."""

    class Widths(Rehearsal):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, *_: Any) -> None:
            self.widths = [*getattr(self, "widths", []), batch["input_ids"].numel()]

    rehearsal = Widths(on_cpu=True)
    train(tmp_path / "run", tiny_base, write(tmp_path), rehearsal, data=DATA | {"seed": 1})
    assert rehearsal.num_tokens == max(rehearsal.widths) > rehearsal.widths[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_device_finds_its_own(world_size: int, tiny_base: Path, tmp_path: Path) -> None:
    """Source: every micro-batch of the epoch, made and measured."""
    module = train(tmp_path / "run", tiny_base, write(tmp_path), data=DATA)
    rows = module.trainer.datamodule.splits["train"].rows  # type: ignore[attr-defined]
    for rank in range(world_size):
        layout = BatchLayout(2, 2, world_size, rank)
        batches = TrainingBatches(rows, layout, seed=0, group_by_length=False, pad_id=0)
        widths = [batches[key]["input_ids"].shape[1] for key in batches.keys(0)]
        assert batches[batches.largest_key(0)]["input_ids"].shape[1] == max(widths)


def test_what_does_not_fit_is_split_before_the_first_step(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    class Early(Shortages):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            super().on_train_start(trainer, module)
            self._now = [Shortage(0)]

    short = Early(Shortage(0))
    module = train(tmp_path, tiny_base, rows_file, short, Rehearsal(on_cpu=True))
    assert short.raised == [(0, "forward")]
    assert module.runner.num_pieces == 2
    assert metrics(tmp_path)["out_of_memory_splits"] == 1


def test_nothing_is_run_on_a_cpu_unless_it_is_asked_for(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    rehearsal = Rehearsal()
    train(tmp_path, tiny_base, rows_file, rehearsal, trainer={"max_steps": 1})
    assert rehearsal.num_tokens == 0
