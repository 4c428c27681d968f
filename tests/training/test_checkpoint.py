"""Saves that go wrong, and what is left then."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import fit
from lightning.pytorch import Callback
from test_resume import adapter_bytes, run

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import write_atomic
from qlora_pl.modeling.folders.adapter_folder import read_adapter_folder
from qlora_pl.training.checkpoints.adapter_save import refuse_dead_adapters, verify_save
from qlora_pl.training.run_folders.run_folder import (
    checkpoint_path,
    checkpoints_newest_first,
    newest_verified,
    product_path,
    step_of,
    verifies,
)

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, tiny_base, rows_file)
    return folder


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """The disk fills up while the fourth checkpoint is written; the resumed run loses nothing."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        if "step-00000004.ckpt" in target and not target.endswith(".sha256"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TrainingStoppedError, match="The disk is full") as stopped:
        run(tmp_path, tiny_base, rows_file)
    assert stopped.value.exit_code == 1
    monkeypatch.undo()
    newest = newest_verified(tmp_path)
    assert newest is not None
    assert step_of(newest) == 3
    assert not list(tmp_path.rglob(".incomplete-*"))
    run(tmp_path, tiny_base, rows_file, resume=True)
    assert adapter_bytes(tmp_path) == adapter_bytes(whole)


def test_the_first_step_is_saved_and_later_ones_replace_it(whole: Path) -> None:
    """``keep_last`` 3 and ``keep_best`` 1: the best is among the last here, or kept besides."""
    steps = sorted(step_of(path) for path in checkpoints_newest_first(whole))
    assert steps[-3:] == [18, 19, 20]
    assert len(steps) <= 4
    assert all(product_path(whole, step, "adapter").is_dir() for step in steps)
    assert len(list((whole / "adapters").iterdir())) == len(steps)


def test_every_adapter_folder_is_whole_and_says_its_step(whole: Path) -> None:
    for path in checkpoints_newest_first(whole):
        manifest = read_adapter_folder(product_path(whole, step_of(path), "adapter"))
        assert manifest.step == step_of(path)
    assert read_adapter_folder(whole / "adapter").step == 20


def test_the_digest_beside_a_checkpoint_is_what_sha256sum_reads(whole: Path) -> None:
    path = checkpoint_path(whole, 20)
    digest, name = path.with_name(path.name + ".sha256").read_text().split()
    assert name == path.name
    assert len(digest) == 64
    assert verifies(path)


def test_a_save_that_reads_back_differently_is_named(whole: Path) -> None:
    folder, checkpoint = product_path(whole, 20, "adapter"), checkpoint_path(whole, 20)
    from qlora_pl.modeling.folders.adapter_folder import read_adapter_tensors

    tensors: dict[str, Any] = read_adapter_tensors(folder)
    verify_save(folder, tensors, checkpoint)
    name = next(iter(tensors))
    with pytest.raises(TrainingStoppedError, match="does not hold what was trained"):
        verify_save(folder, tensors | {name: tensors[name] + 1e-7}, checkpoint)
    with pytest.raises(TrainingStoppedError, match="extra tensors"):
        verify_save(folder, {name: tensors[name]}, checkpoint)


def test_a_dead_adapter_is_refused_at_the_save() -> None:
    tensors = {"layer.lora_A.weight": torch.ones(2, 2), "layer.lora_B.weight": torch.zeros(2, 2)}
    refuse_dead_adapters(tensors, step=0)
    with pytest.raises(TrainingStoppedError, match=r"'layer.lora_B.weight' is still zero"):
        refuse_dead_adapters(tensors, step=1)


def test_a_write_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    write_atomic(path, "old")

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TrainingStoppedError, match="disk is full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.json"]


class Grow(Callback):
    """Lets the weights grow beyond bounds in the first step."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(1e38)


def test_a_model_that_has_diverged_is_told_so_at_the_save(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """Its logits are not finite, which is not the adapter folder's fault."""
    with pytest.raises(TrainingStoppedError, match="gives logits that are not finite"):
        fit(tmp_path, tiny_base, rows_file, Grow())
