"""Which run ``--ckpt_path`` continues, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli.words import FIT
from qlora_pl.training.run_folders.run_lock import RunLock

WORDS = (
    *(*FIT, "--data.template", "guanaco", "--trainer.accelerator", "cpu", "--run.name", "a"),
    *("--samples.num_prompts", "0"),
)
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


def test_auto_resumes_what_is_unfinished_and_else_starts_anew(
    type_in: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    assert type_in(*WORDS, "--trainer.max_steps", "2", "--ckpt_path", "auto")[0] == 0
    assert type_in(*WORDS, "--trainer.max_steps", "2", "--ckpt_path", "auto")[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs/a").iterdir()) == [
        "version_0",
        "version_1",
    ]
    (tmp_path / "runs/a/version_1/metrics.json").unlink()  # as a kill would have left it
    assert type_in(*WORDS, "--trainer.max_steps", "3", "--ckpt_path", "auto")[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs/a").iterdir()) == [
        "version_0",
        "version_1",
    ]
    assert (tmp_path / "runs/a/version_1/checkpoints/step-00000003.ckpt").is_file()


def test_a_run_that_is_being_written_is_not_resumed(
    type_in: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    assert type_in(*WORDS, "--trainer.max_steps", "2")[0] == 0
    run = tmp_path / "runs/a/version_0"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    lock = RunLock(run)
    code, printed = type_in(*WORDS, "--trainer.max_steps", "3", "--ckpt_path", "last")
    lock.release()
    assert code == 2
    assert len(printed) == 1
    assert printed[0].startswith("qlora-pl: 'runs/a/version_0' is being written by process ")
    del before[run / ".lock"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_resume_says_what_it_continues_and_what_it_passed_over(
    type_in: Callable[..., tuple[int, list[str]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = ("--trainer.max_steps", "3", "--checkpoint.every_n_steps", "1")
    assert type_in(*WORDS, *steps)[0] == 0
    newest = tmp_path / "runs/a/version_0/checkpoints/step-00000003.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "runs/a/version_0/metrics.json").unlink()  # as a kill would have left it
    caplog.clear()
    assert type_in(*WORDS, *steps, "--ckpt_path", "last")[0] == 0
    told = [
        record.message
        for record in caplog.records
        if record.name == "qlora_pl.training.run_folders.run_start"
    ]
    folder = "runs/a/version_0/checkpoints"
    assert told == [
        f"Passed over the checkpoint '{folder}/step-00000003.ckpt' (its SHA-256 is not what "
        "step-00000003.ckpt.sha256 says).",
        f"fit: resuming {folder}/step-00000002.ckpt at step 2",
    ]


def test_an_older_checkpoint_branches_off_into_a_folder_of_its_own(
    type_in: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    steps = ("--trainer.max_steps", "3", "--checkpoint.every_n_steps", "1")
    assert type_in(*WORDS, *steps)[0] == 0
    older = "runs/a/version_0/checkpoints/step-00000002.ckpt"
    before = (tmp_path / "runs/a/version_0/metrics.csv").read_bytes()
    assert type_in(*WORDS, *steps, "--ckpt_path", older)[0] == 0
    adapters = [tmp_path / f"runs/a/version_{n}/adapter/adapter_model.safetensors" for n in (0, 1)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert (tmp_path / "runs/a/version_0/metrics.csv").read_bytes() == before
