"""One run of a grid as a process of its own, from its start to the sentence about its end.

Every executor calls ``run_task``, on whichever machine: it starts ``python -m qlora_pl fit``,
waits, and writes down what came of it. The process is a run like any other, so what it needs to
survive a kill (checkpoints, locks, ``--ckpt_path auto``) is what every run has.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_pl.ablation.grid.identity import code_version
from qlora_pl.ablation.running.folder_lock import FolderLock
from qlora_pl.ablation.running.store import Kind, RunHome, RunState

GRACE_SECONDS = 120.0
"""For a run that is asked to stop: to finish its step and save."""
POLL_SECONDS = 0.2
TAIL_BYTES = 8000
OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "cannot allocate memory")
NOT_FINITE = ("not finite", "is NaN", "is nan")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an executor needs to know of a run; plain values, so that it travels."""

    name: str
    root: str
    """Of all grids; on a disk that every machine sees."""
    identity: str
    words: tuple[str, ...]
    """For ``qlora-pl fit``."""
    description: Mapping[str, Any] = field(default_factory=dict)
    directory: str = "."
    """Where relative paths of the training file begin."""
    num_gpus: int = 0


def fit_words(task: Task) -> list[str]:
    """What ``qlora-pl`` is started with: the run, where it writes, and to go on if it can."""
    home = RunHome(Path(task.root), task.identity)
    where = [f"--run.root={home.path}", "--run.name=fit", "--ckpt_path=auto"]
    return ["fit", *task.words, *where]


def run_task(
    task: Task,
    devices: str | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
    variables: Mapping[str, str] | None = None,
) -> RunState:
    """Train one run, or go on with it; what is finished stays as it is.

    Args:
        task: The run.
        devices: For ``CUDA_VISIBLE_DEVICES``; None: as it is.
        is_stopping: Asked while the run goes on; once it says so the run saves and ends.
        variables: Of the environment, besides.

    Returns:
        What has become of it; also written into its home.

    Raises:
        AblationError: if the home cannot be read.
    """
    home = RunHome(Path(task.root).resolve(), task.identity)
    home.path.mkdir(parents=True, exist_ok=True)
    with FolderLock(home.path, wait=is_stopping) as lock:
        if not lock.is_held:  # another process trains it, and this one is to stop
            return replace(home.state(), kind="stopped")
        state = home.state()
        if home.is_complete():
            state = replace(state, kind="finished", why=None)
            home.note(state)
            return state
        home.describe({"name": task.name, "words": list(task.words), **task.description})
        state = state.next_attempt(code_version(), socket.gethostname())
        home.note(state)
        began = time.monotonic()
        code = _watched(task, home, devices, is_stopping, variables or {}, lock.descriptor)
        seconds = state.seconds + time.monotonic() - began
        kind, why = judge(code, tail(home.log), home.is_complete())
        state = replace(state, kind=kind, why=why, seconds=seconds)
        home.note(state)
        return state


def _watched(
    task: Task,
    home: RunHome,
    devices: str | None,
    is_stopping: Callable[[], bool],
    variables: Mapping[str, str],
    lock: int,
) -> int:
    environment = {**os.environ, **variables}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"):
        environment.pop(name, None)  # the array's task is the grid's, not the run's
    with home.log.open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "qlora_pl",
                *fit_words(replace(task, root=str(home.path.parents[1]))),
            ],
            cwd=task.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),  # were this process killed, the run would keep its home locked
            start_new_session=True,  # Ctrl-C is this process's to hand on
        )
        asked: float | None = None
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
            if asked is None and is_stopping():
                process.send_signal(signal.SIGTERM)
                asked = time.monotonic()
            if asked is not None and time.monotonic() - asked > GRACE_SECONDS:
                os.killpg(process.pid, signal.SIGKILL)
        return code


def tail(log: Path) -> str:
    """The last lines of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")


def judge(code: int, said: str, is_complete: bool) -> tuple[Kind, str | None]:
    """What the end of a process means.

    Args:
        code: Its exit code; negative: the signal that killed it.
        said: The last that it printed.
        is_complete: Whether its metrics say that it reached its end.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1].removeprefix("qlora-pl: ") if lines else "it printed nothing"
    if code == 0 and is_complete:
        return "finished", None
    if code == 0:
        return "stopped", last
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return "stopped", "ended by a signal; it goes on from its checkpoint"
    if code < 0:
        name = signal.Signals(-code).name
        if code == -signal.SIGKILL:
            return "stopped", f"{name}: by someone, or by the system for want of memory"
        return ("stopped" if code == -signal.SIGTERM else "failed"), f"{name}; {last}"
    if any(sign in last for sign in NOT_FINITE):
        return "not finite", last
    if any(sign.lower() in said.lower() for sign in OUT_OF_MEMORY):
        return "out of memory", last
    return "failed", last
