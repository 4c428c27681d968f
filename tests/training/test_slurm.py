"""What a job knows of itself without a cluster; tests/slurm/ has a real one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from qlora_pl.training.processes.slurm import (
    asks_for_requeue,
    begun_before,
    name_for_scontrol,
    note_job,
    requeue,
)
from qlora_pl.training.run_folders.run_folder import RunConfig


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"CLUSTER_NAME": "c", "JOB_ID": "7", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("RESTART_COUNT", "ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    return monkeypatch


@pytest.fixture
def noted(in_job: pytest.MonkeyPatch, tmp_path: Path) -> RunConfig:
    """An experiment whose first run was begun by this job, and whose second by another."""
    config = RunConfig(name="a", root=str(tmp_path))
    for number, job in enumerate(("7", "8")):
        folder = config.experiment / f"version_{number}"
        folder.mkdir(parents=True)
        in_job.setenv("SLURM_JOB_ID", job)
        note_job(folder)
    (config.experiment / "version_2").mkdir()
    in_job.setenv("SLURM_JOB_ID", "7")
    return config


def test_a_job_that_starts_again_knows_its_own_run_among_newer_ones(
    noted: RunConfig, in_job: pytest.MonkeyPatch
) -> None:
    in_job.setenv("SLURM_RESTART_COUNT", "1")
    assert begun_before(noted) == noted.experiment / "version_0"


def test_a_job_that_starts_for_the_first_time_continues_nothing(noted: RunConfig) -> None:
    assert begun_before(noted) is None


@pytest.mark.parametrize(
    ("name", "value"), [("JOB_ID", "9"), ("STEP_ID", "1"), ("CLUSTER_NAME", "other")]
)
def test_another_job_step_or_cluster_is_another_run(
    name: str, value: str, noted: RunConfig, in_job: pytest.MonkeyPatch
) -> None:
    in_job.setenv("SLURM_RESTART_COUNT", "1")
    in_job.setenv(f"SLURM_{name}", value)
    assert begun_before(noted) is None


def test_outside_of_slurm_no_job_is_noted(tmp_path: Path, in_job: pytest.MonkeyPatch) -> None:
    in_job.delenv("SLURM_JOB_ID")
    note_job(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not asks_for_requeue(signal.SIGUSR1)


def test_one_task_of_an_array_is_not_named_like_the_array() -> None:
    """SLURM gives the last task the id of the array, under which scontrol requeues every task."""
    task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert name_for_scontrol(task) == "7_3"
    assert name_for_scontrol({"SLURM_JOB_ID": "7"}) == "7"


def test_only_sigusr1_asks_for_a_requeue(in_job: pytest.MonkeyPatch) -> None:
    """SIGTERM comes from scancel too, and from SLURM's own requeue."""
    assert asks_for_requeue(signal.SIGUSR1)
    assert not asks_for_requeue(signal.SIGTERM)
    assert not asks_for_requeue(None)


def test_a_job_that_cannot_be_queued_again_says_what_to_do(
    in_job: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``scontrol`` is missing in many containers."""
    in_job.setenv("PATH", str(tmp_path))
    assert not requeue()
    assert "submit it anew, with --ckpt_path auto" in caplog.text
