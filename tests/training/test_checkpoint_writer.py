"""Saves in the background: training goes on, errors come to light, nothing is deleted too early."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import fill, load
from lightning.pytorch import Callback, Trainer
from test_resume import adapter_bytes, history, run

from qlora_pl.errors import AdapterFolderError, TrainingStoppedError
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.parameters import adapter_tensors, trainable_tensors
from qlora_pl.training.checkpoints.checkpoint_files import Kept, Retention
from qlora_pl.training.checkpoints.checkpoint_writer import CheckpointWriter, host_copy
from qlora_pl.training.run_folders.run_folder import (
    checkpoints_newest_first,
    is_complete,
    newest_verified,
    step_of,
)

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]


# -- the writer ------------------------------------------------------------------------------------


def test_jobs_run_one_after_another_and_the_next_waits_for_the_one_before() -> None:
    writer, gate, order = CheckpointWriter(), threading.Event(), []

    def first() -> None:
        gate.wait(60)
        order.append("first")

    writer.submit(first)
    order.append("goes on")
    threading.Timer(0.2, gate.set).start()
    writer.submit(lambda: order.append("second"))
    writer.finish()
    assert order == ["goes on", "first", "second"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (TrainingStoppedError("The disk is full."), "The disk is full."),
        (AdapterFolderError("'a' was altered."), "'a' was altered."),
        (ValueError("odd"), "A save failed (ValueError: odd)."),
    ],
)
def test_an_error_is_a_sentence_with_exit_code_1_and_ends_all_saving(
    error: Exception, sentence: str
) -> None:
    writer, done = CheckpointWriter(), []

    def fail() -> None:
        raise error

    writer.submit(fail)
    with pytest.raises(TrainingStoppedError) as stopped:
        writer.submit(lambda: done.append(1))
    assert str(stopped.value) == sentence
    assert stopped.value.exit_code == 1
    writer.wait()
    assert not done


def test_a_copy_shares_no_memory_with_what_is_trained() -> None:
    state = {"a": torch.ones(3), "b": [torch.ones(2), (1, "x")], "c": None}
    copied = host_copy(state)
    state["a"].zero_()
    state["b"][0].zero_()
    assert copied["a"].sum() == 3
    assert copied["b"][0].sum() == 2
    assert copied["b"][1] == (1, "x")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "dora"},
        {"bias": "all"},
        {"trainable_tokens": ["<|im_start|>"]},
    ],
    ids=str,
)
def test_copies_get_the_names_that_peft_gives_to_the_live_tensors(
    saved: Callable[[str], Path], tokenizer: Any, settings: dict[str, Any]
) -> None:
    from qlora_pl.modeling.base.vocabulary import rows_of

    base = load(saved("OPT" if "bias" in settings else "LLaMA")).model
    config = LoRAConfig(r=4, **settings)
    rows = rows_of(base, tokenizer, config.trainable_tokens) if config.trainable_tokens else {}
    model = attach_adapters(base, config, 0, rows)
    fill(model)
    trained = {name: tensor.detach().clone() for name, tensor in trainable_tensors(model).items()}
    live, copies = adapter_tensors(model), adapter_tensors(model, trained)
    assert live.keys() == copies.keys()
    assert all(torch.equal(live[name], copies[name]) for name in live)


# -- in a run --------------------------------------------------------------------------------------


class At(Callback):
    """Calls a function at the start of a micro-batch."""

    def __init__(self, micro_batch: int, call: Callable[[Trainer], None]) -> None:
        self.micro_batch = micro_batch
        self.call = call

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.micro_batch:
            self.call(trainer)


def intercept_sync(
    monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[[Path], None]
) -> None:
    """Calls a function before files of this name (and none of their digests) are flushed."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        if target.endswith(name):
            call(Path(target))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 3 cannot end before micro-batch 5 begins; until then it does not count."""
    gate, seen = threading.Event(), []

    def look(trainer: Trainer) -> None:
        newest = newest_verified(tmp_path)
        seen.append((trainer.global_step, trainer.checkpoint_callback.last_checkpoint, newest))
        gate.set()

    def wait(_: Path) -> None:
        assert gate.wait(60), "training waits for the save"

    intercept_sync(monkeypatch, "step-00000003.ckpt", wait)
    saving = {"every_n_steps": 3, "keep_best": 0, "keep_last": 1}
    run(tmp_path, tiny_base, rows_file, checkpoint=saving, callbacks=[At(5, look)], max_epochs=1)
    ((step, last, newest),) = seen
    assert step == 5
    assert step_of(last) == step_of(newest) == 1


def test_an_error_in_the_background_stops_the_run_at_the_next_micro_batch(
    tmp_path: Path, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for the save of step 2; there is none after it that would notice."""

    def fail(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ended: list[int] = []

    class End(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.checkpoint_callback._writer.wait()  # so that the disk has answered by now

        def on_exception(self, trainer: Trainer, *_: Any) -> None:
            ended.append(trainer.global_step)

    intercept_sync(monkeypatch, "step-00000002.ckpt", fail)
    saving = {"every_n_steps": 2, "keep_best": 0}
    with pytest.raises(TrainingStoppedError, match="The disk is full"):
        run(tmp_path, tiny_base, rows_file, checkpoint=saving, callbacks=[End()])
    assert ended == [3]
    assert [step_of(path) for path in checkpoints_newest_first(tmp_path)] == [1]
    kept = json.loads((tmp_path / "checkpoints/kept.json").read_text())
    assert kept["steps"] == [1]


def test_what_reads_back_differently_stops_the_run_and_replaces_nothing(
    tmp_path: Path, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit of the checkpoint of step 3 flips on its way to the disk."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    intercept_sync(monkeypatch, "step-00000003.ckpt", flip)
    saving = {"every_n_steps": 1, "keep_best": 0, "keep_last": 1}
    with pytest.raises(TrainingStoppedError, match="differs from what was written; check the disk"):
        run(tmp_path, tiny_base, rows_file, checkpoint=saving)
    newest = newest_verified(tmp_path)
    assert newest is not None
    assert step_of(newest) == 2
    assert (tmp_path / "adapters/step-00000002").is_dir()


class Killed(Exception):
    """Stands for a kill, within one process."""


def test_a_run_that_was_killed_before_its_adapter_was_published_is_finished_on_resuming(
    tmp_path: Path, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_pl.training.checkpoints.checkpoint as checkpoint

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(checkpoint, "publish_folder", killed)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(Killed):
        run(tmp_path / "a", tiny_base, rows_file, max_epochs=1)
    assert not (tmp_path / "a/adapter").exists()
    monkeypatch.undo()
    run(tmp_path / "a", tiny_base, rows_file, resume=True, max_epochs=1)
    run(tmp_path / "b", tiny_base, rows_file, max_epochs=1)
    assert is_complete(tmp_path / "a")
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    assert history(tmp_path / "a") == history(tmp_path / "b")


@pytest.mark.slow
def test_a_disk_that_is_really_full_leaves_the_last_good_checkpoint(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """A file system in memory, with room for some saves; the resumed run has more of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        (disk / "run").mkdir()
        (tmp_path / "whole").mkdir()
        saving = {"every_n_steps": 1, "keep_last": 20}
        with pytest.raises(TrainingStoppedError, match="The disk is full") as stopped:
            run(disk / "run", tiny_base, rows_file, checkpoint=saving)
        assert stopped.value.exit_code == 1
        newest = newest_verified(disk / "run")
        assert newest is not None
        assert not list(disk.rglob(".incomplete-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run(disk / "run", tiny_base, rows_file, resume=True, checkpoint=saving)
        run(tmp_path / "whole", tiny_base, rows_file, checkpoint=saving)
        assert adapter_bytes(disk / "run") == adapter_bytes(tmp_path / "whole")
        assert history(disk / "run") == history(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- what is kept ----------------------------------------------------------------------------------


def test_the_newest_the_best_and_every_nth_are_kept() -> None:
    retention = Retention(
        every_n_steps=2, keep_last=2, keep_best=1, keep_every_n_steps=5, mode="min"
    )
    saved = [step for step in range(1, 15) if retention.saves(step)]
    assert saved == [1, 2, 4, 5, 6, 8, 10, 12, 14]
    assert retention.keep(saved, {4: 1.0, 8: 1.5}) == [4, 5, 10, 12, 14]


def test_a_save_on_a_signal_leaves_no_trace_when_newer_ones_are_there() -> None:
    retention = Retention(
        every_n_steps=4, keep_last=2, keep_best=1, keep_every_n_steps=None, mode="min"
    )
    assert retention.keep([4, 8, 9], {}) == [8, 9]
    assert retention.keep([8, 9, 12], {}) == [8, 12] == retention.keep([4, 8, 12], {})
    assert retention.keep([8, 9, 12], {9: 0.5}) == [8, 9, 12]


def test_what_a_kill_left_of_a_deletion_goes_with_the_next(tmp_path: Path) -> None:
    for name in ("checkpoints", "adapters"):
        (tmp_path / name).mkdir()
    for step in (1, 2, 3):
        (tmp_path / f"checkpoints/step-{step:08d}.ckpt.sha256").touch()
        (tmp_path / f"adapters/step-{step:08d}").mkdir()
    for step in (2, 3):
        (tmp_path / f"checkpoints/step-{step:08d}.ckpt").touch()
    Kept(run=tmp_path, product="adapter", steps=(3,), best_step=None, best_score=None).write()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [
        "adapters",
        "adapters/step-00000003",
        "checkpoints",
        "checkpoints/kept.json",
        "checkpoints/step-00000003.ckpt",
        "checkpoints/step-00000003.ckpt.sha256",
    ]
