"""``make faults``: every sweep and every kind, and the table of docs/reliability.md.

About a thousand runs and their resumed ones: an hour on two cores. ``FAULTS_SEED`` and
``FAULTS_COUNT`` choose the random part, ``FAULTS_PROCESSES`` how many runs go on at a time; a word
(``sweeps``, ``random``, ``ranks``) does a part of it, and leaves the page alone.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from faults.fault import Fault
from faults.kinds import KINDS, Passed, draw_all
from faults.proving import Outcome
from faults.ranks import RANK_FAULTS, prove_ranks
from faults.report import Table, put_into
from faults.runs import Runs
from faults.sweeps import ACTIONS, PARTS, Sweep

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
MEANS = {
    "kill": "SIGKILL at each operation",
    "error": "an error at each operation (disk full from then on, or one I/O error)",
}


class Job(NamedTuple):
    """One injection."""

    row: str
    """Of the table."""
    part: str = ""
    """Of a sweep, with its fault; or"""
    fault: Fault | None = None
    kind: str = ""
    """a kind, with its own seed; or"""
    seed: int = 0
    ranks: str = ""
    """a fault of several processes."""


class Worker:
    """Does jobs, in one process of several."""

    runs: Runs
    sweeps: dict[str, Sweep]

    @classmethod
    def start(cls, folder: str) -> None:
        """Have the uninterrupted run at hand."""
        cls.runs = Runs(Path(tempfile.mkdtemp(dir=folder)))
        cls.sweeps = {}

    @classmethod
    def do(cls, job: Job) -> Outcome:
        """One injection from end to end."""
        if job.part:
            assert job.fault is not None
            if job.part not in cls.sweeps:
                cls.sweeps[job.part] = Sweep(cls.runs, job.part)
            return cls.sweeps[job.part].outcome(job.fault)
        if job.ranks:
            return prove_ranks(cls.runs, job.ranks)
        kind = next(kind for kind in KINDS if kind.name == job.kind)
        passed = Passed.of(cls.runs.warm_run.events)
        return kind.inject(cls.runs, passed, random.Random(job.seed))


def seed_and_count() -> tuple[int, int]:
    """Of the random injections."""
    return int(os.environ.get("FAULTS_SEED", "0")), int(os.environ.get("FAULTS_COUNT", "220"))


def jobs_of(words: list[str], folder: Path) -> Iterator[Job]:
    """Every injection of the parts that are named."""
    if "sweeps" in words:
        runs = Runs(folder / "listing")
        for part, meant in PARTS.items():
            sweep = Sweep(runs, part)
            for action in ACTIONS:
                row = f"{meant}: {MEANS[action]}"
                yield from (Job(row, part=part, fault=fault) for fault in sweep.faults(action))
        runs.close()
    if "random" in words:
        drawn = draw_all(*seed_and_count())
        for kind in KINDS:
            yield from (Job(k.name, kind=k.name, seed=s) for k, s in drawn if k is kind)
    if "ranks" in words:
        yield from (Job(name, ranks=name) for name in RANK_FAULTS)


def main(words: list[str]) -> int:
    """Run the parts that are named, or all, and write the table if nothing was lost."""
    folder, table = Path(tempfile.mkdtemp(prefix="faults-")), Table()
    try:
        jobs = list(jobs_of(words or ["sweeps", "random", "ranks"], folder))
        with ProcessPoolExecutor(
            int(os.environ.get("FAULTS_PROCESSES", "1")),
            multiprocessing.get_context("spawn"),
            Worker.start,
            (str(folder),),
        ) as pool:
            for job, outcome in zip(jobs, pool.map(Worker.do, jobs), strict=True):
                table.add(job.row, outcome)
                if outcome.problems:
                    print(f"{job.row}: {outcome}\n{outcome.said}", flush=True)
                elif table.num_injections % 50 == 0:
                    print(f"{table.num_injections} of {len(jobs)}", flush=True)
    finally:
        shutil.rmtree(folder)
    seed, _ = seed_and_count()
    print(table.text(seed))
    if table.failures:
        return 1
    if not words:
        put_into(PAGE, table.text(seed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
