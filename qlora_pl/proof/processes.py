"""Runs as processes of their own: started, watched, and killed with all their children.

Each run is the leader of a process group, in which Lightning's further devices and loaders are too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from qlora_pl.errors import ConfigurationError, TrainingStoppedError
from qlora_pl.proof.cut import CutRun
from qlora_pl.training.run_folders.run_folder import (
    checkpoints_newest_first,
    runs_newest_first,
    step_of,
    verifies,
)

POLL_SECONDS = 0.005
"""Between looks for a save: a tiny model takes a step in 30 ms."""
GROUP_SECONDS = 10.0
"""For a killed group to be gone, its devices' memory included."""


class Ended(NamedTuple):
    """How a run's process ended."""

    exit_code: int
    """Negative: the signal that killed it."""
    seconds: float


def run_to_end(run: CutRun, root: Path, log: Path, tell: Callable[[int], None]) -> Ended:
    """Start a run, or resume it, and wait until it ends.

    Args:
        run: What to start.
        root: Its ``run.root``.
        log: Takes what it prints.
        tell: Called with the newest saved step, again and again.
    """
    with _started(run, root, log) as (process, began):
        while process.poll() is None:
            tell(saved_step(run, root))
            time.sleep(0.1)
        return Ended(process.returncode, time.monotonic() - began)


def run_until_saved(
    run: CutRun, root: Path, log: Path, step: int, tell: Callable[[int], None]
) -> Ended:
    """Start a run and kill it by SIGKILL as soon as a step's checkpoint is on disk.

    Returns:
        How it ended; ``exit_code`` is 0 where it was over before the kill.
    """
    with _started(run, root, log) as (process, began):
        next_word = 0.0
        while process.poll() is None:
            if saved_step(run, root) >= step and verifies(_newest(run, root)):
                break
            if time.monotonic() > next_word:
                tell(saved_step(run, root))
                next_word = time.monotonic() + 0.1
            time.sleep(POLL_SECONDS)
        _kill(process)
        return Ended(process.returncode, time.monotonic() - began)


def run_folder(run: CutRun, root: Path) -> Path | None:
    """The newest run's folder under a root, or None."""
    return next(iter(runs_newest_first(run.run_config(root))), None)


def saved_step(run: CutRun, root: Path) -> int:
    """The newest step of which a checkpoint is there, or 0."""
    folder = run_folder(run, root)
    return max(map(step_of, checkpoints_newest_first(folder)), default=0) if folder else 0


def raise_as_told(ended: Ended, log: Path) -> None:
    """Say of a run that failed by itself what it said.

    Raises:
        ConfigurationError: if it was a user's mistake.
        TrainingStoppedError: if it was anything else.
    """
    if ended.exit_code == 0:
        return
    told = sentences(log)
    if ended.exit_code == 2 and told:
        raise ConfigurationError(told)
    raise TrainingStoppedError("\n".join([*told, _failed(ended, log)]))


def sentences(log: Path) -> list[str]:
    """The sentences with which a command ended."""
    lines = log.read_text(errors="replace").splitlines()
    return [line.removeprefix("qlora-pl: ") for line in lines if line.startswith("qlora-pl: ")]


def _failed(ended: Ended, log: Path) -> str:
    how = f"signal {-ended.exit_code}" if ended.exit_code < 0 else f"exit code {ended.exit_code}"
    return f"The run failed by itself ({how}), so nothing could be compared; read '{log}'."


def _newest(run: CutRun, root: Path) -> Path:
    folder = run_folder(run, root)
    assert folder is not None
    return checkpoints_newest_first(folder)[0]


@contextmanager
def _started(run: CutRun, root: Path, log: Path) -> Iterator[tuple[subprocess.Popen, float]]:
    """A process that does not outlive the block, whatever ends it."""
    command = [sys.executable, "-m", "qlora_pl", "fit", *run.command_words(root)]
    began = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its process group holds all it starts
        )
    try:
        yield process, began
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Kill a process's whole group and wait until it is gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    given_up = time.monotonic() + GROUP_SECONDS
    while time.monotonic() < given_up:
        try:
            os.killpg(process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.01)
