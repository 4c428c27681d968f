"""What a run says it came to is what its last step came to, however the run ended."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from test_resume import Killed, adapter_bytes, history, run

from qlora_pl.cli import result_line
from qlora_pl.training.run_folders.run_folder import (
    RunConfig,
    checkpoint_path,
    find_checkpoint,
    is_complete,
    newest_verified,
)
from qlora_pl.training.watching.monitoring import COLUMNS, RunMetrics

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]

SEVEN: dict[str, Any] = {"max_steps": 7, "max_epochs": None, "log_every_n_steps": 5}
"""Ten batches an epoch, a validation and a row every five: the end is at neither."""


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("seven")
    run(folder, tiny_base, rows_file, **SEVEN)
    return folder


def test_every_figure_is_of_the_last_step(seven: Path) -> None:
    said, rows = metrics(seven), table(seven)
    assert [row["step"] for row in rows] == ["0", "1", "5", "7"]
    assert said["step"] == said["val/step"] == 7
    for name in ("train/loss", "optim/lr", "optim/grad_norm", "val/loss", "val/perplexity"):
        assert said[name] == float(rows[-1][name]), name
    assert said["rows"] == 14


def test_what_the_allocator_holds_for_each_byte_in_use_is_a_column(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The allocator's two counters stand in, as there is none here; test_gpu.py has the real."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 4 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 6 * 2**30)
    step: Any = SimpleNamespace(loss=1.0, learning_rate=1e-4, grad_norm=0.1)
    row = RunMetrics()._training_row(SimpleNamespace(global_step=3), step)  # type: ignore[arg-type]
    assert row["memory/peak_allocated_gib"] == 4.0
    assert row["memory/reserved_over_allocated"] == 1.5
    assert "memory/reserved_over_allocated" in COLUMNS


def test_epochs_are_counted_in_fractions(seven: Path) -> None:
    """Seven of ten micro-batches are done."""
    assert metrics(seven)["epoch"] == 0.7
    assert [float(row["epoch"]) for row in table(seven)] == [0.0, 0.1, 0.5, 0.7]


def test_the_last_validation_changes_no_byte_of_what_is_trained(
    seven: Path,
    tmp_path: Path,
    tiny_base: Path,
    rows_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlora_pl.training.watching.monitoring.validate_now", lambda _: None)
    run(tmp_path, tiny_base, rows_file, **SEVEN)
    assert metrics(tmp_path)["val/step"] == 5
    assert adapter_bytes(tmp_path) == adapter_bytes(seven)
    one, other = [
        torch.load(checkpoint_path(folder, 7), weights_only=True) for folder in (seven, tmp_path)
    ]
    states = [checkpoint["random_states"][0] for checkpoint in (one, other)]
    assert torch.equal(states[0]["torch"], states[1]["torch"])
    assert states[0]["python"] == states[1]["python"]
    assert one["loops"] == other["loops"]
    assert list(one["scores"]) == [5, 7]
    assert list(other["scores"]) == [5]


@pytest.mark.parametrize("kill_at", [3, 6])
def test_a_run_that_ends_between_validations_resumes_to_the_same_end(
    seven: Path, tmp_path: Path, tiny_base: Path, rows_file: Path, kill_at: int
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, tiny_base, rows_file, kill_at, **SEVEN)
    run(tmp_path, tiny_base, rows_file, resume=True, **SEVEN)
    assert adapter_bytes(tmp_path) == adapter_bytes(seven)
    assert history(tmp_path) == history(seven)
    kept = [(folder / "checkpoints/kept.json").read_text() for folder in (tmp_path, seven)]
    assert kept[0] == kept[1]


def test_a_finished_run_that_trains_on_keeps_its_last_row(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    sparse = {"checkpoint": {"every_n_steps": 100}}
    run(tmp_path, tiny_base, rows_file, **SEVEN, **sparse)
    run(tmp_path, tiny_base, rows_file, resume=True, **SEVEN | {"max_steps": 12}, **sparse)
    assert [row["step"] for row in table(tmp_path)] == ["0", "1", "5", "7", "10", "12"]
    assert metrics(tmp_path)["epoch"] == 1.2


def test_a_finished_run_that_trains_on_is_unfinished_until_it_ends(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    run(tmp_path, tiny_base, rows_file, **SEVEN)
    assert is_complete(tmp_path)
    with pytest.raises(Killed):
        run(tmp_path, tiny_base, rows_file, 9, resume=True, **SEVEN | {"max_steps": 12})
    assert not is_complete(tmp_path)


def test_the_clock_goes_on_over_a_resume(tmp_path: Path, tiny_base: Path, rows_file: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, tiny_base, rows_file, 6, **SEVEN)
    newest = newest_verified(tmp_path)
    assert newest is not None
    before = torch.load(newest, weights_only=True)["callbacks"]["RunMetrics"]["runtime_seconds"]
    run(tmp_path, tiny_base, rows_file, resume=True, **SEVEN)
    said = metrics(tmp_path)
    assert said["runtime_seconds"] > before
    assert said["runtime_seconds"] > said["training_seconds"]


class ThreeSteps(Timer):
    """A clock that runs out after the third step of each start."""

    def __init__(self) -> None:
        super().__init__(duration={"seconds": 3})
        self.steps = 0

    @property
    def state_key(self) -> str:
        return "Timer"

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        super().on_train_batch_end(*args, **kwargs)

    def time_elapsed(self, stage: Any = None) -> float:
        return self._offset + self.steps


def test_a_run_that_ran_out_of_time_is_continued(
    seven: Path, tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """Each start has the whole time, or a resumed one could never go on."""
    folder = tmp_path / "version_0"
    folder.mkdir()
    for start, step in enumerate((3, 6, 7)):
        clock = [ThreeSteps()]
        trainer = run(folder, tiny_base, rows_file, resume=start > 0, callbacks=clock, **SEVEN)
        told = f"fit: stopped by trainer.max_time at step {step}, continue with --ckpt_path last: "
        assert result_line(trainer, "fit", folder) == (told if step < 7 else "fit: ") + str(folder)
        assert metrics(folder)["step"] == step
        assert metrics(folder)["is_complete"] == (step == 7)
        config = RunConfig(name=tmp_path.name, root=str(tmp_path.parent))
        found = find_checkpoint(config, "auto")
        assert found == (None if step == 7 else checkpoint_path(folder, step))
    assert adapter_bytes(folder) == adapter_bytes(seven)


def test_a_run_that_ran_out_of_time_within_its_last_epoch_is_not_complete(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """Lightning counts an epoch that is cut short as one that is done."""
    limits = {"max_epochs": 1, "max_steps": -1, "log_every_n_steps": 5}
    trainer = run(tmp_path, tiny_base, rows_file, callbacks=[ThreeSteps()], **limits)
    assert trainer.global_step < trainer.num_training_batches
    assert not is_complete(tmp_path)


class StopAt(Callback):
    """Asks for the end at a step, as early stopping does."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 4


def test_a_run_that_a_callback_ended_is_complete(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    run(tmp_path, tiny_base, rows_file, callbacks=[StopAt()], **SEVEN)
    assert metrics(tmp_path)["step"] == 4
    assert is_complete(tmp_path)
