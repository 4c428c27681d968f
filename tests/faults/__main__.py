"""``make faults``: every sweep and every kind, and the table of docs/reliability.md.

About a thousand runs and their resumed ones: an hour on two cores. ``FAULTS_SEED`` and
``FAULTS_COUNT`` choose the random part, ``FAULTS_PROCESSES`` how many runs go on at a time; a word
(``sweeps``, ``random``, ``ranks``) does a part of it, and leaves the page alone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from faults.jobs import Worker, jobs_of, seed_and_count
from faults.report import Table, put_into

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


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
