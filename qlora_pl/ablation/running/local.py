"""Runs on this machine, as many at once as its devices and memory carry."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from qlora_pl.ablation.running.store import RunState
from qlora_pl.ablation.running.task import Task, run_task
from qlora_pl.errors import ConfigurationError

Report = Callable[[Task, RunState | None, BaseException | None], None]
"""Told of each run: None while it starts, its state when it has ended, or what went wrong."""


class Executor(Protocol):
    """What starts runs somewhere."""

    def run(self, tasks: Sequence[Task], report: Report, is_stopping: threading.Event) -> None:
        """See ``LocalExecutor.run``."""


def slots(gpus: Sequence[str], per_run: int, jobs: int | None) -> list[str | None]:
    """What each run that goes on at once sees of this machine's GPUs.

    Args:
        gpus: As ``CUDA_VISIBLE_DEVICES`` names them; empty: runs train on CPUs.
        per_run: GPUs of one run.
        jobs: Runs at once; None: as many as the GPUs carry, on CPUs one.

    Raises:
        ConfigurationError: if a run needs more GPUs than there are, or the jobs do.
    """
    if not gpus:
        return [None] * (jobs or 1)
    most = len(gpus) // per_run
    if most == 0:
        raise ConfigurationError(
            f"a run of this grid trains on {per_run} GPUs and there are {len(gpus)}; name a file "
            "with fewer trainer.devices by --machine."
        )
    if jobs is not None and jobs > most:
        raise ConfigurationError(
            f"--jobs: {jobs} runs of {per_run} GPUs each need more than the {len(gpus)} there are."
        )
    shares = (gpus[place * per_run : (place + 1) * per_run] for place in range(jobs or most))
    return [",".join(share) for share in shares]


class LocalExecutor:
    """Starts processes here.

    Args:
        slots: One for each run that may go on at once: the GPUs that it sees, as
            ``CUDA_VISIBLE_DEVICES`` has them, or None for a run on CPUs.
    """

    def __init__(self, slots: Sequence[str | None]) -> None:
        self._slots = list(slots)

    def run(self, tasks: Sequence[Task], report: Report, is_stopping: threading.Event) -> None:
        """Train all tasks; returns when each has ended, or has stopped because it was asked to.

        Args:
            tasks: In the order in which they start.
            report: Called in this thread.
            is_stopping: Set from outside; what goes on then saves and ends, nothing else starts.
        """
        waiting, free = list(tasks), list(self._slots)
        going: dict[Future[RunState], tuple[Task, str | None]] = {}
        with ThreadPoolExecutor(len(self._slots)) as pool:
            while waiting or going:
                while waiting and free and not is_stopping.is_set():
                    task, slot = waiting.pop(0), free.pop(0)
                    report(task, None, None)
                    future = pool.submit(run_task, task, slot, is_stopping.is_set)
                    going[future] = (task, slot)
                if not going:
                    return
                done, _ = wait(going, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    task, slot = going.pop(future)
                    free.append(slot)
                    error = future.exception()
                    report(task, None if error else future.result(), error)
