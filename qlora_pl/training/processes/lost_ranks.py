"""What becomes of a run that loses a process: the others end, with a sentence and an exit code.

A process that was killed closes its connections, and the next exchange of the others fails; one
that stands still is given up after the process group's time-out. Neither may be waited for for
ever, and a rank that goes on alone would train something else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from subprocess import Popen
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.training.processes.ranks import lost_connection

POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0
"""How long the first process has to find out by itself that another has ended."""


def watch_other_ranks(trainer: Trainer, timeout_seconds: float) -> None:
    """Wait for other ranks no longer than this, and let a lost one be told of.

    Args:
        trainer: Not yet running.
        timeout_seconds: For every exchange between ranks.
    """
    strategy: Any = trainer.strategy
    if hasattr(strategy, "_timeout"):
        strategy._timeout = timedelta(seconds=timeout_seconds)
    launcher = strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        strategy._launcher = WatchfulLauncher(
            launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        )


class WatchfulLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, which does not kill this process when another has ended.

    Lightning's own does, without a word and in the middle of whatever it is writing.
    """

    def launch(
        self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any
    ) -> Any:
        """Start the other processes, then call the function in this one."""
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=_watch, args=(self.procs, trainer), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def lost(self) -> str | None:
        """A sentence on a process that this one started and that ended badly, or None."""
        return _describe_loss(self.procs)


def _watch(processes: Sequence[Popen], trainer: Any) -> None:
    """End this process if another has ended and it does not notice: it may wait in a device."""
    while all(process.poll() in (None, 0) for process in processes):
        if all(process.poll() == 0 for process in processes):
            return
        time.sleep(POLL_SECONDS)
    time.sleep(GRACE_SECONDS)
    if trainer.state.status != TrainerStatus.RUNNING:  # it has noticed, and is ending in order
        return
    print(f"qlora-pl: {_describe_loss(processes)}", file=sys.stderr, flush=True)
    for process in processes:
        process.kill()
    os._exit(TrainingStoppedError.exit_code)


def _describe_loss(processes: Sequence[Popen]) -> str | None:
    for rank, process in enumerate(processes, start=1):
        code = process.poll()
        if code in (None, 0):
            continue
        how = (
            f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        )
        return f"Process {rank} of this machine {how}; continue with --ckpt_path last."
    return None


def lost_rank(error: BaseException, trainer: Any) -> TrainingStoppedError | None:
    """The error that says so if a run ended because another rank did, or did not answer.

    Kills what this process started and does not end by itself.

    Args:
        error: What Lightning raised.
        trainer: Of the run.
    """
    if trainer.world_size == 1 or not isinstance(error, RuntimeError):
        return None
    if (lost := lost_connection(error)) is None:
        return None
    launcher, sentence = trainer.strategy.launcher, None
    if isinstance(launcher, WatchfulLauncher):
        deadline = time.monotonic() + 2 * POLL_SECONDS  # its connection closes before it is gone
        while (sentence := launcher.lost()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        launcher.kill(signal.SIGKILL)
    return lost if sentence is None else TrainingStoppedError(sentence)
