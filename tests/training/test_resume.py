"""A run that is stopped anywhere and resumed ends byte for byte where it would have ended."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.errors import CheckpointError, ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig, ScheduleConfig
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import (
    checkpoints_newest_first,
    newest_verified,
    verifies,
)
from qlora_pl.training.stopping import leaving_on_signals
from qlora_pl.training.watching.monitoring import RunMetrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
]


COSINE = ScheduleConfig(name="cosine_with_floor", warmup_steps=2)


class Killed(Exception):
    """Stands for a kill, within one process."""


class KillAt(Callback):
    """Stops the process at the start of a micro-batch, counted over the whole run."""

    def __init__(self, micro_batch: int | None) -> None:
        self.micro_batch = micro_batch

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.micro_batch:
            raise Killed


def run(
    folder: Path,
    base: Path,
    rows: Path,
    kill_at: int | None = None,
    resume: bool = False,
    accumulation: int = 1,
    **changes: Any,
) -> Trainer:
    """Two epochs of 20 rows; validation in the middle and at the end of each."""
    seed_everything(7)
    module = QLoRAModule(
        str(base),
        lora=LoRAConfig(r=4, dropout=0.2, **changes.pop("lora", {})),
        optimizer=OptimizerConfig(lr=1.0e-2, **changes.pop("optimizer", {})),
        schedule=changes.pop("schedule", COSINE),
        gradient_checkpointing=False,
    )
    data = InstructionDataModule(
        rows,
        **{"template": "guanaco", "val_size": 2, "batch_size": changes.pop("batch_size", 2)}
        | changes.pop("data", {}),
    )
    checkpointing = {"every_n_steps": 1, "keep_last": 3} | changes.pop("checkpoint", {})
    callbacks = [RunMetrics(), AdapterCheckpoint(**checkpointing), KillAt(kill_at)]
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accumulate_grad_batches": accumulation,
        "gradient_clip_val": 0.3,
        "val_check_interval": 5,
        "num_sanity_val_steps": -1,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "use_distributed_sampler": False,
        "callbacks": callbacks + changes.pop("callbacks", []),
    }
    trainer = Trainer(default_root_dir=folder, **settings | changes)
    checkpoint = newest_verified(folder) if resume else None
    assert not resume or checkpoint is not None
    with leaving_on_signals(trainer):
        trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def history(folder: Path) -> list[tuple[str, ...]]:
    """What metrics.csv says of each step, without timings."""
    with (folder / "metrics.csv").open() as file:
        names = ("step", "epoch", "train/loss", "optim/lr", "optim/grad_norm", "val/loss")
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path
) -> Any:
    """One whole run for each accumulation, made when it is first asked for."""
    made: dict[int, Path] = {}

    def get(accumulation: int) -> Path:
        if accumulation not in made:
            made[accumulation] = tmp_path_factory.mktemp("whole")
            run(made[accumulation], tiny_base, rows_file, accumulation=accumulation)
        return made[accumulation]

    return get


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Path:
    """The folder of a run that was killed after its third micro-batch, to be copied."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        run(folder, tiny_base, rows_file, kill_at=3)
    return folder


@pytest.mark.parametrize(
    ("accumulation", "kills"),
    [
        pytest.param(1, [3], id="mid-epoch"),
        pytest.param(1, [5], id="after-a-step-with-a-validation"),
        pytest.param(1, [10], id="after-the-last-step-of-an-epoch"),
        pytest.param(4, [6], id="inside-an-accumulation-window"),
        pytest.param(4, [6, 5], id="again-in-the-first-window-after-the-resume"),
        pytest.param(4, [10], id="accumulating-at-the-end-of-an-epoch"),
        pytest.param(4, [13, 14, 18], id="three-times"),
    ],
)
def test_a_resumed_run_ends_in_the_bytes_of_the_uninterrupted_one(
    tmp_path: Path,
    tiny_base: Path,
    rows_file: Path,
    uninterrupted: Any,
    accumulation: int,
    kills: list[int],
) -> None:
    whole = uninterrupted(accumulation)
    for number, kill_at in enumerate(kills):
        with pytest.raises(Killed):
            run(tmp_path, tiny_base, rows_file, kill_at, number > 0, accumulation)
    run(tmp_path, tiny_base, rows_file, None, True, accumulation)
    assert adapter_bytes(tmp_path) == adapter_bytes(whole)
    assert history(tmp_path) == history(whole)
    kept = [(folder / "checkpoints" / "kept.json").read_text() for folder in (tmp_path, whole)]
    assert kept[0] == kept[1]
    names = [[p.name for p in checkpoints_newest_first(folder)] for folder in (tmp_path, whole)]
    assert names[0] == names[1]


def test_the_history_holds_every_step_once_and_the_validations_where_they_are_due(
    uninterrupted: Any,
) -> None:
    rows = history(uninterrupted(1))
    assert [row[0] for row in rows] == [str(step) for step in range(21)]
    assert [row[0] for row in rows if row[-1]] == ["0", "5", "10", "15", "20"]


def test_a_checkpoint_loads_with_weights_only_and_holds_nothing_of_the_base(
    uninterrupted: Any,
) -> None:
    path = newest_verified(uninterrupted(1))
    checkpoint = torch.load(path, weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    state = checkpoint["optimizer_states"][0]["state"]
    assert set(state) == set(checkpoint["state_dict"])
    assert checkpoint["boundary"] == {
        "step": 20,
        "epoch": 2,
        "position": 0,
        "is_validation_due": False,
    }
    base_bytes = sum(t.numel() * t.element_size() for t in checkpoint["state_dict"].values())
    assert (
        Path(path).stat().st_size < 3 * base_bytes + 80_000
    )  # adapters, two Adam states, the rest


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora": {"alpha": 8.0}}, "model.lora.alpha=16.0, this run has 8.0"),
        ({"optimizer": {"weight_decay": 0.1}}, "model.optimizer.weight_decay=0.0"),
        ({"batch_size": 4}, r"data.global_batch_size\): it had 2, this run has 4"),
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val=0.3, this run has 1.0"),
        ({"gradient_clip_algorithm": "value"}, "trainer.gradient_clip_algorithm=norm"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    killed: Path,
    tmp_path: Path,
    tiny_base: Path,
    rows_file: Path,
    changes: dict[str, Any],
    named: str,
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=named):
        run(tmp_path, tiny_base, rows_file, resume=True, **changes)


def test_a_folder_that_holds_another_run_is_not_written_to(
    killed: Path, tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match="never overwritten"):
        run(tmp_path, tiny_base, rows_file)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, tiny_base: Path, rows_file: Path, uninterrupted: Any
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, tiny_base, rows_file, kill_at=4)
    newest, before, *_ = checkpoints_newest_first(tmp_path)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert not verifies(newest)
    assert newest_verified(tmp_path) == before
    run(tmp_path, tiny_base, rows_file, resume=True)
    assert adapter_bytes(tmp_path) == adapter_bytes(uninterrupted(1))


def test_a_longer_schedule_is_taken_up_at_its_own_rate(
    tmp_path: Path, tiny_base: Path, rows_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Step k of N trains at 1 - (k - 1)/N of the peak (linear, no warm-up), whatever N was."""
    linear = {"schedule": ScheduleConfig(name="linear"), "max_epochs": None}
    run(tmp_path, tiny_base, rows_file, max_steps=4, **linear)
    run(tmp_path, tiny_base, rows_file, resume=True, max_steps=8, **linear)
    rates = {row[0]: float(row[3]) for row in history(tmp_path) if row[3]}
    assert rates["4"] == pytest.approx(1.0e-2 * 1 / 4)
    for step in range(5, 9):
        assert rates[str(step)] == pytest.approx(1.0e-2 * (1 - (step - 1) / 8))
    told = [record.message for record in caplog.records if "schedule's length" in record.message]
    assert len(told) == 1
    assert "step 5 trains at a learning rate of 0.005 instead of 0." in told[0]


def test_validations_that_are_counted_across_epochs_stay_where_they_are_after_resuming(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """Every fourth micro-batch of twenty, by ``trainer.check_val_every_n_epoch: null``."""
    across = {"check_val_every_n_epoch": None, "val_check_interval": 4}
    for number, kill_at in enumerate((5, 9)):
        with pytest.raises(Killed):
            run(tmp_path, tiny_base, rows_file, kill_at, number > 0, **across)
    run(tmp_path, tiny_base, rows_file, resume=True, **across)
    validated = [row[0] for row in history(tmp_path) if row[-1]]
    assert validated == ["0", "4", "8", "12", "16", "20"]


def test_a_validation_in_the_first_window_after_resuming_counts_for_the_best(
    tmp_path: Path, tiny_base: Path, rows_file: Path, uninterrupted: Any
) -> None:
    """Step 1 ends with micro-batch 4, and is validated after 5, which the resumed run repeats."""
    with pytest.raises(Killed):
        run(tmp_path, tiny_base, rows_file, kill_at=5, accumulation=4)
    run(tmp_path, tiny_base, rows_file, resume=True, accumulation=4)
    scores = [
        torch.load(newest_verified(folder), weights_only=True)["scores"]
        for folder in (tmp_path, uninterrupted(4))
    ]
    assert 1 in scores[1]
    assert scores[0] == scores[1]


def test_metrics_json_says_what_the_run_came_to(uninterrupted: Any) -> None:
    metrics = json.loads((uninterrupted(1) / "metrics.json").read_text())
    assert metrics["is_complete"]
    assert metrics["step"] == 20
    assert metrics["rows"] == 40
    assert metrics["val/loss"] < metrics["before"]["val/loss"]
    assert os.path.exists(uninterrupted(1) / "adapter" / "manifest.json")
