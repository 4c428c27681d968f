"""A smoke test leaves nothing behind, whatever ends it, and takes itself for no part of a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_pl.errors import ConfigurationError
from qlora_pl.smoke.reaper import processes_of
from qlora_pl.smoke.surroundings import (
    OFFLINE,
    hub_answers,
    own_environment,
    refuse_several,
    temporary_folder,
)

ROOT = Path(__file__).parents[2]
TEST = """
import subprocess, sys, time
from qlora_pl.smoke.surroundings import own_environment, temporary_folder
with temporary_folder(is_kept=sys.argv[1] == "keep") as folder, own_environment(folder, False):
    (folder / "base").mkdir()
    # A process that has one of its own, in a session that no signal to the test reaches.
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, start_new_session=True)
    print(folder, flush=True)
    time.sleep(60)
"""


def start(place: Path, kept: str = "remove") -> tuple[subprocess.Popen, Path]:
    """A process that stands for a test, and its folder, once both of its children are there."""
    process = subprocess.Popen(
        [sys.executable, "-c", TEST, kept],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(place)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # As in a terminal: in the background of a shell it would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    with process.stdout as told:
        folder = Path(told.readline().strip())
    assert comes_true(lambda: len(processes_of(folder)) == 2)
    return process, folder


def comes_true(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    given_up = time.monotonic() + seconds
    while not is_so() and time.monotonic() < given_up:
        time.sleep(0.02)
    return is_so()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_test_that_a_signal_ends_has_cleared_up_before_it_is_gone(
    number: signal.Signals, tmp_path: Path
) -> None:
    process, folder = start(tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert processes_of(folder) == []
    assert list(tmp_path.iterdir()) == []


def test_even_sigkill_leaves_neither_processes_nor_a_folder_and_others_untouched(
    tmp_path: Path,
) -> None:
    process, folder = start(tmp_path)
    other, others_folder = start(tmp_path)
    process.kill()
    process.wait()
    assert comes_true(lambda: not folder.exists() and not processes_of(folder))
    assert others_folder.is_dir()
    assert len(processes_of(others_folder)) == 2
    other.kill()
    other.wait()
    assert comes_true(lambda: list(tmp_path.iterdir()) == [])


def test_a_folder_that_is_to_be_kept_is_kept_but_no_process(tmp_path: Path) -> None:
    process, folder = start(tmp_path, "keep")
    process.kill()
    process.wait()
    assert comes_true(lambda: not processes_of(folder))
    assert (folder / "base").is_dir()


def test_a_folder_that_cannot_be_made_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    refused = pytest.raises(ConfigurationError, match=r"no temporary folder.*TMPDIR")
    with refused, temporary_folder(is_kept=False):
        pass


def test_the_job_around_a_test_is_not_seen_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that saw it would wait for the job's other tasks, or have the job queued again."""
    of_job = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_RESTART_COUNT": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "15007",
        "RANK": "0",
        "QLORA_PL_RUN_FOLDER": "runs/mine/version_0",
    }
    for name, value in of_job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "mine")
    for name in OFFLINE:
        monkeypatch.delenv(name, raising=False)
    with own_environment(tmp_path, is_online=True):
        assert not set(of_job) & set(os.environ)
        assert os.environ["HF_TOKEN"] == "mine"
        assert os.environ["QLORA_PL_CACHE"].startswith(str(tmp_path))
        assert not set(OFFLINE) & set(os.environ)
    assert {name: os.environ[name] for name in of_job} == of_job
    with own_environment(tmp_path, is_online=False):
        assert all(os.environ[name] == "1" for name in OFFLINE)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
    ],
)
def test_one_of_several_processes_is_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="call it once"):
        refuse_several()


def test_one_process_of_a_job_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    refuse_several()


@pytest.mark.parametrize("name", OFFLINE)
def test_a_machine_that_is_told_to_stay_offline_asks_nobody(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: asked.append(1))
    monkeypatch.setenv(name, "1")
    assert not hub_answers()
    assert not asked
