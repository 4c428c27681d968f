"""Injections as jobs for several processes: which there are, and how one is done."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from faults.fault import Fault
from faults.kinds import KINDS, Passed, draw_all
from faults.proving import Outcome
from faults.ranks import RANK_FAULTS, prove_ranks
from faults.runs import Runs
from faults.sweeps import ACTIONS, PARTS, Sweep

WORDS = (*PARTS, "random", "ranks")
"""What can be run by itself: sweeps through parts of a run, random places, several processes."""
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


def jobs_of(word: str, folder: Path) -> Iterator[Job]:
    """Every injection of one of ``WORDS``."""
    if word in PARTS:
        runs = Runs(folder / f"listing-{word}")
        sweep = Sweep(runs, word)
        for action in ACTIONS:
            row = f"{PARTS[word]}: {MEANS[action]}"
            yield from (Job(row, part=word, fault=fault) for fault in sweep.faults(action))
        runs.close()
    if word == "random":
        drawn = draw_all(*seed_and_count())
        for kind in KINDS:
            yield from (Job(k.name, kind=k.name, seed=s) for k, s in drawn if k is kind)
    if word == "ranks":
        yield from (Job(name, ranks=name) for name in RANK_FAULTS)
