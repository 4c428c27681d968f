"""``make faults``: every sweep and every kind, and the table of docs/reliability.md.

Half an hour to an hour. ``FAULTS_SEED`` and ``FAULTS_COUNT`` choose the random part; words choose
parts: ``sweeps``, ``random``, ``ranks``.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from faults.kinds import Passed, draw_all
from faults.proving import Outcome
from faults.report import Table, put_into
from faults.runs import Runs
from faults.sweeps import ACTIONS, PARTS, Sweep

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
MEANS = {
    "kill": "SIGKILL at each operation",
    "EIO": "an I/O error at each operation",
    "ENOSPC": "the disk full from each operation on that takes space",
}


def seed_and_count() -> tuple[int, int]:
    """Of the random injections."""
    return int(os.environ.get("FAULTS_SEED", "0")), int(os.environ.get("FAULTS_COUNT", "220"))


def main(words: list[str]) -> int:
    """Run the parts that are named, or all, and write the table if all went well."""
    chosen = words or ["sweeps", "random"]
    folder, table = Path(tempfile.mkdtemp(prefix="faults-")), Table()
    seed, count = seed_and_count()
    runs = Runs(folder)

    def take(kind: str, outcome: Outcome) -> None:
        table.add(kind, outcome)
        if outcome.problems:
            print(f"{kind}: {outcome}\n{outcome.said}", flush=True)

    try:
        if "sweeps" in chosen:
            for part in PARTS:
                sweep = Sweep(runs, part)
                for action in ACTIONS:
                    for outcome in sweep.outcomes(action):
                        take(f"one {part}: {MEANS[action]}", outcome)
        if "random" in chosen:
            passed = Passed.of(runs.warm_run.events)
            for kind, own_seed in draw_all(seed, count):
                take(kind.name, kind.inject(runs, passed, random.Random(own_seed)))
    finally:
        runs.close()
        shutil.rmtree(folder)
    print(table.text(seed))
    if table.failures:
        return 1
    if not words:
        put_into(PAGE, table.text(seed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
