"""``make faults``: every sweep and every kind, and the table of docs/reliability.md.

About a thousand runs and their resumed ones: an hour on two cores. Words (``start``, ``resume``,
``save``, ``end``, ``random``, ``ranks``) do a part of it, which is remembered; when all parts were
run with the same code and nothing was lost, the table is written. ``FAULTS_SEED`` and
``FAULTS_COUNT`` choose the random part, ``FAULTS_PROCESSES`` how many runs go on at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from faults.jobs import WORDS, Worker, jobs_of, seed_and_count
from faults.report import Records, Row, code_digest, put_into, table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"


def perform(word: str, folder: Path, pool: ProcessPoolExecutor) -> list[Row]:
    """Do one part; says what was lost as it comes."""
    jobs = list(jobs_of(word, folder))
    rows: dict[str, Row] = {}
    for number, (job, outcome) in enumerate(
        zip(jobs, pool.map(Worker.do, jobs), strict=True), start=1
    ):
        rows.setdefault(job.row, Row(job.row)).add(outcome)
        if outcome.problems:
            print(f"{job.row}: {outcome}\n{outcome.said}", flush=True)
        elif number % 50 == 0 or number == len(jobs):
            print(f"{word}: {number} of {len(jobs)}", flush=True)
    return list(rows.values())


def main(words: list[str]) -> int:
    """Do the parts that are named, or all; 1 if anything was lost."""
    if unknown := set(words) - set(WORDS):
        print(f"no part is called '{unknown.pop()}' (there are {', '.join(WORDS)})")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    records, is_lost = Records(ROOT / ".cache" / "faults", code_digest(ROOT)), False
    try:
        with ProcessPoolExecutor(
            int(os.environ.get("FAULTS_PROCESSES", "1")),
            multiprocessing.get_context("spawn"),
            Worker.start,
            (str(folder),),
        ) as pool:
            for word in words or WORDS:
                rows = perform(word, folder, pool)
                is_lost |= any(row.equal < row.injections for row in rows)
                records.keep(word, rows)
    finally:
        shutil.rmtree(folder)
    seed, _ = seed_and_count()
    done = records.rows(WORDS)
    if done is not None:
        print(table(done, seed))
        if all(row.equal == row.injections for row in done):
            put_into(PAGE, table(done, seed))
    return 1 if is_lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
