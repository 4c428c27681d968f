"""Runs as a SLURM array, through submitit, which pickles the call, submits and requeues it.

A task that is preempted or reaches its time limit is queued again, and its run goes on from its
last checkpoint. The command that submitted may end at any time: started again, it finds what is
finished, and what still runs by its lock.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from qlora_pl.ablation.running.local import Report
from qlora_pl.ablation.running.store import RunHome, RunState
from qlora_pl.ablation.running.task import GRACE_SECONDS, Task, run_task
from qlora_pl.errors import AblationError, ConfigurationError

INSTALL = 'the executor slurm needs submitit: pip install "qlora-pl[slurm]".'
POLL_SECONDS = 2.0


class SlurmExecutor:
    """Submits runs as one array.

    Args:
        folder: For submitit's logs; on a disk that all nodes see.
        jobs: Runs at once; None: as many as the cluster starts.
        settings: Further ones for sbatch, as submitit names them (``slurm_partition`` and so on).
        cluster: ``slurm``, or ``local`` for processes on this machine, which tests use.

    Raises:
        ConfigurationError: if submitit is not installed, or there is no SLURM here.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int | None = None,
        settings: dict[str, Any] | None = None,
        cluster: str = "slurm",
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigurationError(INSTALL) from error
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ConfigurationError(
                "--executor slurm: no sbatch is to be found here; log in where jobs are submitted."
            )
        self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        own: dict[str, Any] = {"name": "qlora-pl-ablate"}
        if cluster == "slurm" and jobs is not None:
            own["slurm_array_parallelism"] = jobs
        self._executor.update_parameters(**own, **(settings or {}))

    def run(self, tasks: Sequence[Task], report: Report, is_stopping: threading.Event) -> None:
        """See ``LocalExecutor.run``; asked to stop, it cancels what it submitted."""
        submitted = self._executor.map_array(RequeuedRun(), list(tasks))
        jobs = dict(zip(submitted, tasks, strict=True))
        started: set[str] = set()
        while jobs:
            time.sleep(POLL_SECONDS)
            if is_stopping.is_set():
                for job in jobs:
                    job.cancel()  # SIGTERM first: runs save
            for job, task in list(jobs.items()):
                home = RunHome(Path(task.root), task.identity)
                if task.name not in started and home.state().kind == "running":
                    started.add(task.name)
                    report(task, None, None)
                if job.done():
                    del jobs[job]
                    self._tell_end(job, task, home, report)

    def _tell_end(self, job: Any, task: Task, home: RunHome, report: Report) -> None:
        try:
            report(task, job.result(), None)
        except Exception as error:  # whatever the cluster did to it; the run's home says the rest
            state = home.state()
            if state.kind == "running":  # cancelled or killed with its node
                report(
                    task, RunState(kind="stopped", attempts=state.attempts, why=str(error)), None
                )
            else:
                report(task, None, AblationError(f"{task.name}: {error}"))


def sbatch_settings(words: Sequence[str]) -> dict[str, Any]:
    """``partition=gpu`` and so on, as submitit takes them.

    Raises:
        ConfigurationError: for a word without a value.
    """
    settings: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or not key or not value:
            raise ConfigurationError(f"--slurm: expected KEY=VALUE, got '{word}'.")
        if key == "time" and not value.isdigit():
            raise ConfigurationError(f"--slurm: time is a number of minutes, got '{value}'.")
        settings[f"slurm_{key}"] = int(value) if value.isdigit() else value
    return settings


class RequeuedRun:
    """A run as submitit calls it, and calls again after a requeue."""

    def __call__(self, task: Task) -> RunState:
        """Train, or go on; in a thread, so that the signal of SLURM finds the main one waiting."""
        self._is_stopping = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            self._going = pool.submit(run_task, task, None, self._is_stopping.is_set)
            return self._going.result()

    def checkpoint(self, task: Task) -> Any:
        """What is queued again when SLURM takes the node away; the run saves first."""
        import submitit

        self._is_stopping.set()
        wait([self._going], timeout=GRACE_SECONDS)
        return submitit.helpers.DelayedSubmission(RequeuedRun(), task)
