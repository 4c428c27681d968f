"""Everything that no CPU can show, on one GPU, without network, in one command.

    python benchmarks/gpu_checks.py [--out FOLDER] [--only NAME ...] [--minutes 9] [--rehearse]

Each check is a process of its own with a time limit; what fails or takes too long does not stop the
others. The record, gpu-DATE.json, is written anew after each. Exit code 0: all have passed.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from gpu.machine import has_cuda
from gpu.place import Check, Findings, Place
from gpu.record import Record
from gpu.running import Runner, findings_path
from processes import REPOSITORY

MINUTES = 9.0
ALONE = "alone"
"""The lane of what measures seconds; it begins when the others have ended."""
CHECKS = (
    Check("nf4", "quantising.codes_and_constants", "a", 60, "NF4 codes, constants and products"),
    Check("nccl", "layouts.nccl", "b", 80, "FSDP2 alone under NCCL against a plain process"),
    Check("ranks", "layouts.two_ranks", "b", 100, "two gloo ranks on one GPU: DDP, FSDP2, offload"),
    Check("moves", "layouts.moves", "b", 130, "begun under one layout, gone on under another"),
    Check("paged", "resuming.paging", "a", 100, "paged optimizer state, whole and resumed"),
    Check("shortage", "memory.shortage", "c", 90, "a real shortage of memory: split, and stop"),
    Check("resume", "resuming.proof", "a", 150, "killed and resumed, byte by byte"),
    Check("tests", "suite.gpu_tests", "c", 200, "pytest -m gpu"),
    Check("speed", "speed.speed", ALONE, 170, "seconds of steps, loading, saves and leaving"),
    Check("answers", "answering.answering", ALONE, 110, "answers alone and in batches, tokens/s"),
    Check("plan", "memory.plan", ALONE, 90, "memory of a step against its estimate"),
    Check("peaks", "memory.peaks", ALONE, 150, "peaks of a few settings against their plans"),
)
"""Checks of one lane share runs, which the first of them makes."""


def main() -> int:
    """Run the checks that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [check.name for check in CHECKS]
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all checks together")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs, which is kept")
    parser.add_argument("--check", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        return perform(arguments.check, arguments.keep, arguments.rehearse, arguments.limit)
    if not arguments.rehearse and not has_cuda():
        print("gpu_checks: there is no CUDA device here; add --rehearse to try it on the CPU.")
        return 2
    chosen = [check for check in CHECKS if not arguments.only or check.name in arguments.only]
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="gpu-checks-"))
    folder.mkdir(parents=True, exist_ok=True)
    # Unwinds: checks that go on are ended, and what was found is written down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        record = Record(arguments.out, chosen, arguments.rehearse)
        return run_all(record, chosen, folder.absolute(), 60 * arguments.minutes)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def run_all(record: Record, chosen: list[Check], folder: Path, seconds: float) -> int:
    """In lanes beside each other on a GPU; one after the other in a rehearsal."""
    print(f"{record.values['device']}, {record.path}", flush=True)
    runner = Runner(record, folder, Path(__file__), seconds)
    alone = [check for check in chosen if check.lane == ALONE]
    others = [check for check in chosen if check.lane != ALONE]
    lanes = [[c for c in others if c.lane == name] for name in sorted({c.lane for c in others})]
    try:
        runner.side_by_side([others] if record.is_rehearsal else lanes)
        runner.side_by_side([alone])
    finally:
        record.close(time.perf_counter() - runner.started)
    return 0 if record.passed else 1


def perform(name: str, folder: Path, is_rehearsal: bool, limit: float) -> int:
    """Do one check here; what it finds goes into a file as it is found."""
    findings = Findings(findings_path(folder, name))
    module, function = next(check.place for check in CHECKS if check.name == name).split(".")
    place = Place(folder=folder, is_rehearsal=is_rehearsal, limit_seconds=limit)
    getattr(importlib.import_module(f"gpu.{module}"), function)(place, findings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
