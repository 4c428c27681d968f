"""The same small grid here, on Ray and through submitit; a lost worker costs time alone."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from grids import outcomes, run, start, write_grid

from qlora_pl.ablation.running.slurm_array import SlurmExecutor, sbatch_settings
from qlora_pl.ablation.running.store import RunState
from qlora_pl.ablation.running.task import Task
from qlora_pl.errors import ConfigurationError

Rows = Callable[..., Path]


@pytest.fixture
def grid(tmp_path: Path, tiny_base: Path, write_rows: Rows) -> Path:
    """Two ranks, two seeds, over two dozen short rows."""
    rows = write_rows(
        [{"prompt": f"How many {n}?", "response": "many " * (2 + n % 5)} for n in range(24)]
    )
    return write_grid(tmp_path, tiny_base, rows)


@pytest.mark.slow
def test_ray_gives_the_numbers_of_this_machine_also_when_a_worker_is_killed(
    tmp_path: Path, grid: Path
) -> None:
    pytest.importorskip("ray")
    run(tmp_path, "--config", grid, "--run", "--root", "here")
    process = start(tmp_path, "--config", grid, "--run", "--root", "cluster", "--executor", "ray")
    killed = _kill_a_worker(process, tmp_path / "cluster")
    said, _ = process.communicate()
    assert killed, said
    assert process.returncode == 0, said
    assert outcomes(tmp_path / "cluster") == outcomes(tmp_path / "here")
    assert len(outcomes(tmp_path / "cluster")) == 4


def _kill_a_worker(process: subprocess.Popen[str], root: Path) -> bool:
    """Kill the Ray worker that watches over the second run, and the run with it."""
    while process.poll() is None:
        time.sleep(0.5)
        if len(list(root.glob("runs/*/fit"))) < 2:
            continue
        listed = subprocess.run(
            ["ps", "-wweo", "pid=,args="], capture_output=True, text=True
        ).stdout
        lines = [line.split(None, 1) for line in listed.splitlines()]
        workers = [int(pid) for pid, words in lines if words.startswith("ray::_run")]
        runs = [int(pid) for pid, words in lines if f"--run.root={root.resolve()}" in words]
        if workers and runs:
            for pid in (*workers, *runs):
                os.kill(pid, signal.SIGKILL)
            return True
    return False


@pytest.mark.slow
def test_submitit_gives_the_numbers_of_this_machine(tmp_path: Path, grid: Path) -> None:
    """Its executor for processes on this machine; SLURM's own differs in who starts them."""
    pytest.importorskip("submitit")
    run(tmp_path, "--config", grid, "--run", "--root", "here")
    words = ("--config", grid, "--run", "--root", "there", "--only", "rank2-seed0")
    run(tmp_path, *words)
    executor = SlurmExecutor(tmp_path / "logs", cluster="local")
    tasks = [
        Task(
            name=path.parent.name,
            root=str(tmp_path / "there"),
            identity=path.parent.name,
            words=tuple(_words(path)),
            directory=str(tmp_path),
        )
        for path in sorted((tmp_path / "here/runs").glob("*/run.json"))
    ]
    ended: dict[str, RunState | None] = {}

    def report(task: Task, state: RunState | None, error: BaseException | None) -> None:
        assert error is None
        ended[task.name] = state

    executor.run(tasks, report, threading.Event())
    assert {state.kind for state in ended.values() if state} == {"finished"}
    assert outcomes(tmp_path / "there") == outcomes(tmp_path / "here")


def _words(path: Path) -> list[str]:
    import json

    words: list[str] = json.loads(path.read_text())["words"]
    return words


def test_settings_for_sbatch() -> None:
    assert sbatch_settings(["partition=gpu", "time=600"]) == {
        "slurm_partition": "gpu",
        "slurm_time": 600,
    }
    with pytest.raises(ConfigurationError, match="expected KEY=VALUE, got 'partition'"):
        sbatch_settings(["partition"])
    with pytest.raises(ConfigurationError, match="time is a number of minutes, got '10:00'"):
        sbatch_settings(["time=10:00"])


def test_without_slurm_it_is_said_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="no sbatch is to be found here"):
        SlurmExecutor(tmp_path)
