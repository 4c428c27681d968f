"""ablation/running: real runs in processes of their own, which end well, badly and not at all."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from grids import outcomes, run, start, write_grid

from qlora_pl.ablation.grid.cells import make_grid
from qlora_pl.ablation.grid.grid_file import read_grid
from qlora_pl.ablation.grid.resolving import idle_axes, resolve
from qlora_pl.ablation.running.folder_lock import FolderLock
from qlora_pl.ablation.running.local import LocalExecutor, slots
from qlora_pl.ablation.running.store import RunHome, RunState
from qlora_pl.ablation.running.task import Task, judge, run_task
from qlora_pl.errors import AblationError, ConfigurationError

Rows = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns where a parser is given words while a command line has some."""
    monkeypatch.setattr("sys.argv", ["qlora-pl"])


@pytest.fixture
def rows(write_rows: Rows) -> Path:
    """Two dozen short rows."""
    return write_rows(
        [{"prompt": f"How many {n}?", "response": "many " * (2 + n % 5)} for n in range(24)]
    )


@pytest.mark.parametrize(
    ("code", "said", "is_complete", "kind"),
    [
        (0, "fit: runs/a\n", True, "finished"),
        (0, "fit: stopped by trainer.max_time\n", False, "stopped"),
        (143, "Stopped by SIGTERM.\n", False, "stopped"),
        (130, "Stopped.\n", False, "stopped"),
        (-9, "half a li", False, "stopped"),
        (-11, "", False, "failed"),
        (2, "qlora-pl: model.lora.r: must be at least 1, got 0.\n", False, "failed"),
        (1, "qlora-pl: the loss of step 4 is not finite (nan).\n", False, "not finite"),
        (2, "qlora-pl: cuda:0: out of memory with a single row.\n", False, "out of memory"),
    ],
)
def test_how_a_process_ended_says_what_became_of_its_run(
    code: int, said: str, is_complete: bool, kind: str
) -> None:
    found, why = judge(code, said, is_complete)
    assert found == kind
    assert (why is None) == (kind == "finished")


def test_a_state_that_was_cut_is_told_and_not_taken_for_a_new_run(tmp_path: Path) -> None:
    home = RunHome(tmp_path, "abc")
    home.note(RunState(kind="finished", attempts=1))
    assert home.state().kind == "finished"
    path = home.path / "state.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(AblationError, match="is not the state of a run"):
        home.state()


def test_metrics_that_were_cut_are_told(tmp_path: Path) -> None:
    home = RunHome(tmp_path, "abc")
    home.folder.mkdir(parents=True)
    (home.folder / "metrics.csv").write_text("step\n1\n")
    (home.folder / "metrics.json").write_text('{"is_complete": tr')
    assert not home.is_complete()
    with pytest.raises(AblationError, match="was cut or changed; remove the run's folder"):
        home.result()


def test_a_second_process_waits_for_the_lock_until_it_is_told_to_stop(tmp_path: Path) -> None:
    asked = []
    with FolderLock(tmp_path) as one:
        assert one.is_held
        with FolderLock(tmp_path, wait=lambda: bool(asked.append(1) or len(asked) > 1)) as two:
            assert not two.is_held
    with FolderLock(tmp_path) as three:
        assert three.is_held


@pytest.mark.parametrize(
    ("gpus", "per_run", "jobs", "seen"),
    [
        ([], 1, None, [None]),
        ([], 1, 2, [None, None]),
        (["0", "1", "2"], 1, None, ["0", "1", "2"]),
        (["4", "5", "6", "7"], 2, None, ["4,5", "6,7"]),
        (["0", "1", "2"], 2, None, ["0,1"]),
        (["0", "1"], 1, 1, ["0"]),
    ],
)
def test_gpus_are_shared_out_among_runs(
    gpus: list[str], per_run: int, jobs: int | None, seen: list[str | None]
) -> None:
    assert slots(gpus, per_run, jobs) == seen


def test_a_run_that_needs_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="trains on 4 GPUs and there are 2"):
        slots(["0", "1"], 4, None)
    with pytest.raises(ConfigurationError, match="--jobs: 3 runs of 1 GPUs each need more"):
        slots(["0", "1"], 1, 3)


def test_as_many_runs_at_once_as_there_are_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going: list[str | None] = []
    most: list[int] = []

    def pretend(task: Task, slot: str | None, is_stopping: Callable[[], bool]) -> RunState:
        going.append(slot)
        most.append(len(going))
        assert len(set(going)) == len(going)  # no device twice
        time.sleep(0.02)
        going.remove(slot)
        return RunState(kind="finished")

    monkeypatch.setattr("qlora_pl.ablation.running.local.run_task", pretend)
    tasks = [Task(name=str(n), root="x", identity=str(n), words=()) for n in range(7)]
    ended = []
    executor = LocalExecutor(["0", "1"])
    executor.run(tasks, lambda task, state, _: state and ended.append(task.name), threading.Event())
    assert sorted(ended) == sorted(task.name for task in tasks)
    assert max(most) == 2


@pytest.mark.slow
def test_a_grid_is_run_reported_and_never_run_again(
    tmp_path: Path, tiny_base: Path, rows: Path
) -> None:
    pytest.importorskip("statsmodels")
    path = write_grid(tmp_path, tiny_base, rows)
    said = run(tmp_path, "--config", path, "--run")
    assert "4 runs: 4 finished" in said
    report = tmp_path / "runs/ablations/small/report.html"
    first = report.read_bytes()
    states = {p: p.read_text() for p in tmp_path.rglob("state.json")}
    assert "4 runs: 4 finished" in run(tmp_path, "--config", path, "--run")
    assert {p: p.read_text() for p in tmp_path.rglob("state.json")} == states  # no new attempt
    run(tmp_path, "--config", path, "--report")
    assert report.read_bytes() == first
    grown = write_grid(tmp_path, tiny_base, rows, seeds=[0, 1, 2])
    run(tmp_path, "--config", grown, "--run", "--only", "rank2-seed2")
    attempts = [json.loads(p.read_text())["attempts"] for p in tmp_path.rglob("state.json")]
    assert attempts == [1] * 5


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["with its runs", "alone"])
def test_a_grid_that_is_killed_and_started_again_ends_as_if_it_had_not_been(
    tmp_path: Path, tiny_base: Path, rows: Path, whole_group: bool
) -> None:
    path = write_grid(tmp_path, tiny_base, rows)
    run(tmp_path, "--config", path, "--run", "--root", "whole")
    moments = random.Random(whole_group).sample(range(8, 60), 3)
    for seconds in moments:
        process = start(tmp_path, "--config", path, "--run", "--root", "killed")
        time.sleep(seconds)
        if whole_group:
            _kill_with_runs(process)
        else:
            process.kill()
        process.communicate()
    assert "4 runs: 4 finished" in run(tmp_path, "--config", path, "--run", "--root", "killed")
    whole, killed = outcomes(tmp_path / "whole"), outcomes(tmp_path / "killed")
    assert len(whole) == 4
    assert killed == whole


def _kill_with_runs(process: subprocess.Popen[str]) -> None:
    """As when a machine dies: the command and every run that it started, which lead own groups."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout
    os.killpg(process.pid, signal.SIGKILL)
    for pid in listed.split():
        os.killpg(int(pid), signal.SIGKILL)


@pytest.mark.slow
def test_a_cell_that_diverges_does_not_stop_the_others(
    tmp_path: Path, tiny_base: Path, rows: Path
) -> None:
    path = write_grid(
        tmp_path,
        tiny_base,
        rows,
        axes={"rate": {"key": "model.optimizer.lr", "values": [1e8, 1e-4]}},
        comparisons={},
        seeds=[0],
    )
    process = start(tmp_path, "--config", path, "--run")
    said, _ = process.communicate()
    assert process.returncode == 1, said
    states = [json.loads(p.read_text())["kind"] for p in tmp_path.rglob("state.json")]
    assert sorted(states) == ["finished", "not finite"], said


@pytest.mark.slow
def test_one_run_is_trained_in_a_process_of_its_own_and_found_again(
    tmp_path: Path, tiny_base: Path, rows: Path
) -> None:
    write_grid(tmp_path, tiny_base, rows)
    task = Task(
        name="a-seed0",
        root=str(tmp_path / "root"),
        identity="abc",
        words=("--config", "base.yaml", "--trainer.max_steps=2"),
        directory=str(tmp_path),
    )
    state = run_task(task)
    assert (state.kind, state.attempts) == ("finished", 1), RunHome(
        tmp_path / "root", "abc"
    ).log.read_text()
    assert run_task(task) == state  # nothing is trained twice
    assert RunHome(tmp_path / "root", "abc").result().metrics["step"] == 2


def test_mistakes_of_all_cells_are_told_at_once(
    tmp_path: Path, tiny_base: Path, rows: Path
) -> None:
    axes = {"rank": {"key": "model.lora.r", "values": [0, 4, -1, "many"]}}
    path = write_grid(tmp_path, tiny_base, rows, axes=axes, comparisons={})
    grid = make_grid(read_grid(path))
    with pytest.raises(ConfigurationError) as caught:
        resolve(grid, [tmp_path / "base.yaml"])
    assert [problem[:34] for problem in caught.value.problems] == [
        "rank0: model.lora.r: must be at le",
        "rank_1: model.lora.r: must be at l",
        "many: model.lora.r: expected a who",
    ], caught.value.problems


def test_what_is_the_same_run_has_the_same_identity_however_it_is_written(
    tmp_path: Path, tiny_base: Path, rows: Path
) -> None:
    axes = {
        "rate": {"key": "model.optimizer.lr", "values": [1e-4, "1.0e-4"]},
        "saves": {"key": "checkpoint.every_n_steps", "values": [1, 2]},
        "type": {"key": "model.quantization.quant_type", "values": ["nf4", "fp4"]},
    }
    path = write_grid(tmp_path, tiny_base, rows, axes=axes, comparisons={}, seeds=[0])
    grid = make_grid(read_grid(path))
    runs = resolve(grid, [tmp_path / "base.yaml"])
    assert len({run.identity for run in runs}) == 2
    assert idle_axes(grid, runs) == ["rate", "saves"]
    before = {run.identity for run in runs}
    rows.write_text(rows.read_text().replace("How many 3?", "How many 4?"))
    assert not before & {run.identity for run in resolve(grid, [tmp_path / "base.yaml"])}
