"""Runs on a Ray cluster: one that is there, or one that is started here for the grid.

Ray chooses the machine, gives a run its GPUs, and starts it again on another worker if its own
dies; the run goes on from its checkpoint, since its home lies on a disk that all machines see.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_pl.ablation.running.local import Report
from qlora_pl.ablation.running.store import RunHome, RunState
from qlora_pl.ablation.running.task import Task, run_task
from qlora_pl.errors import AblationError, ConfigurationError

INSTALL = 'the executor ray needs Ray: pip install "qlora-pl[ray]".'
RETRIES = 5
"""Workers that may die under one run."""
POLL_SECONDS = 1.0


class RayExecutor:
    """Starts runs as Ray tasks.

    Args:
        address: Of a cluster's head; None: a cluster is started here, and ended with the grid.
        jobs: Runs at once on a cluster that is started here; CPUs are divided among them.
        cpus: That one run asks a cluster for.

    Raises:
        ConfigurationError: if Ray is not installed, or nothing answers at the address.
    """

    def __init__(self, address: str | None = None, jobs: int = 1, cpus: float = 1.0) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigurationError(INSTALL) from error
        self._ray, self._cpus = ray, cpus
        own: dict[str, Any] = {"num_cpus": jobs * cpus} if address is None else {}
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                **own,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            said = str(error).strip().splitlines()
            raise ConfigurationError(
                f"--ray-address: nothing answers at '{address}' ({said[0] if said else error})."
            ) from error

    def run(self, tasks: Sequence[Task], report: Report, is_stopping: threading.Event) -> None:
        """See ``LocalExecutor.run``."""
        ray = self._ray
        call = ray.remote(_run)
        stops = {task.root: RunHome.stop_file(task.root) for task in tasks}
        for path in stops.values():
            path.unlink(missing_ok=True)
        going = {}
        for task in tasks:
            own = call.options(num_cpus=self._cpus, num_gpus=task.num_gpus, max_retries=RETRIES)
            going[own.remote(task)] = task
        started: set[str] = set()
        try:
            while going:
                done, _ = ray.wait(list(going), num_returns=1, timeout=POLL_SECONDS)
                self._tell_started(going.values(), started, report)
                for one in done:
                    task = going.pop(one)
                    try:
                        report(task, ray.get(one), None)
                    except ray.exceptions.RayError as error:
                        report(task, None, AblationError(_first_line(error)))
                if is_stopping.is_set():
                    for path in stops.values():
                        path.touch()
                    for one, task in list(going.items()):
                        if task.name not in started:
                            ray.cancel(one, force=False)
        finally:
            for path in stops.values():
                path.unlink(missing_ok=True)
            ray.shutdown()

    def _tell_started(self, tasks: Any, started: set[str], report: Report) -> None:
        for task in tasks:
            home = RunHome(Path(task.root), task.identity)
            if task.name not in started and home.state().kind == "running":
                started.add(task.name)
                report(task, None, None)


def _run(task: Task) -> RunState:
    stop = RunHome.stop_file(task.root)
    began = time.time()

    def is_stopping() -> bool:
        return stop.exists() and stop.stat().st_mtime >= began - 1

    return run_task(task, is_stopping=is_stopping)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
