"""Everything that no CPU can show, on one GPU, without network, in one command.

    python benchmarks/gpu_checks.py [--out FOLDER] [--only NAME ...] [--minutes 9] [--rehearse]

Each check is a process of its own with a time limit; what fails or takes too long does not stop the
others. The record, gpu-DATE.json, is written anew after each. Exit code 0: all have passed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu.machine import describe_machine, has_cuda, versions
from processes import REPOSITORY, environment

MINUTES = 9.0
LEAST_SECONDS = 10.0
"""A check is not begun with less."""
GRACE_SECONDS = 10.0
"""Between SIGTERM, which lets a check end the runs that it has started, and SIGKILL."""
REHEARSAL_FACTOR = 6.0
"""CPUs have no hurry."""


@dataclass(frozen=True)
class Check:
    """One of the list below."""

    name: str
    place: str
    """Module of ``gpu`` and function in it."""
    seconds: float
    """Its limit on a GPU."""
    title: str


CHECKS = (
    Check("nf4", "quantising.codes_and_constants", 60, "NF4 codes, constants and products"),
    Check("nccl", "layouts.nccl", 70, "FSDP2 alone under NCCL against a plain process"),
    Check("ranks", "layouts.two_ranks", 90, "two gloo ranks on one GPU: DDP, FSDP2, offloaded"),
    Check("moves", "layouts.moves", 90, "begun under one layout, gone on under another"),
    Check("paged", "resuming.paging", 80, "paged optimizer state, whole and resumed"),
    Check("shortage", "memory.shortage", 80, "a real shortage of memory: split, and stop"),
    Check("resume", "resuming.proof", 120, "killed and resumed, byte by byte"),
    Check("speed", "speed.speed", 160, "seconds of steps, loading, saves and leaving"),
    Check("plan", "memory.plan", 80, "memory of a step against its estimate"),
    Check("tests", "suite.gpu_tests", 150, "pytest -m gpu"),
)


def main() -> int:
    """Run the checks that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [check.name for check in CHECKS]
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all checks together")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny, on the CPU: tries the script"
    )
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
    # Unwinds: the check that goes on is ended, and what was found is printed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        record = Record(arguments.out, chosen, arguments.rehearse)
        return run_all(record, chosen, folder.absolute(), arguments.minutes * 60)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


# -- one check, in its own process -----------------------------------------------------------------


def perform(name: str, folder: Path, is_rehearsal: bool, limit: float) -> int:
    """Do one check here; what it finds goes into a file as it is found."""
    from gpu.place import Findings, Place

    check = next(check for check in CHECKS if check.name == name)
    module, function = check.place.split(".")
    place = Place(folder=folder, is_rehearsal=is_rehearsal, limit_seconds=limit)
    findings = Findings(findings_path(folder, name))
    getattr(importlib.import_module(f"gpu.{module}"), function)(place, findings)
    return 0


def findings_path(folder: Path, name: str) -> Path:
    """Where a check writes."""
    return folder / f"findings-{name}.json"


# -- all of them -----------------------------------------------------------------------------------


class Record:
    """The results file, complete after each check.

    Args:
        out: Folder of results.
        chosen: The checks, in their order.
        is_rehearsal: A rehearsal's file has another name, and says so.
    """

    def __init__(self, out: Path, chosen: list[Check], is_rehearsal: bool) -> None:
        now = datetime.now(UTC)
        kind = "gpu-rehearsal" if is_rehearsal else "gpu"
        self.path = out / f"{kind}-{now:%Y-%m-%d}.json"
        self.is_rehearsal = is_rehearsal
        self.values: dict[str, Any] = {
            "date": f"{now:%Y-%m-%d %H:%M} UTC",
            "is_rehearsal": is_rehearsal,
            "passed": False,
            **describe_machine(is_rehearsal),
            "versions": versions(),
            "checks": {c.name: {"title": c.title, "outcome": "not run"} for c in chosen},
        }
        out.mkdir(parents=True, exist_ok=True)
        self.save()

    def add(self, name: str, result: dict[str, Any]) -> None:
        """What came of a check."""
        self.values["checks"][name] |= result
        outcomes = {check["outcome"] for check in self.values["checks"].values()}
        self.values["passed"] = outcomes == {"passed"}
        self.save()

    def save(self) -> None:
        """Write the whole file under another name, then rename it."""
        temporary = self.path.with_suffix(".partial")
        with temporary.open("w") as file:
            file.write(json.dumps(self.values, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def run_all(record: Record, chosen: list[Check], folder: Path, seconds: float) -> int:
    """One after the other, until the time is up."""
    started = time.perf_counter()
    print(f"{record.values['device']}, {record.path}", flush=True)
    try:
        for check in chosen:
            factor = REHEARSAL_FACTOR if record.is_rehearsal else 1.0
            left = seconds - (time.perf_counter() - started)
            if left < LEAST_SECONDS:
                print(f"{'not run':10} {check.name}: the time is up", flush=True)
                continue
            print(f"{'':10} {check.name}: {check.title} ...", flush=True)
            run_one(record, check, folder, round(min(left, factor * check.seconds), 1))
    finally:
        record.values["seconds"] = round(time.perf_counter() - started, 1)
        record.save()
        print_summary(record)
    return 0 if record.values["passed"] else 1


def run_one(record: Record, check: Check, folder: Path, limit: float) -> None:
    """Start a check, wait for it, end it with everything it has started, record what it found."""
    command = [sys.executable, __file__, "--check", check.name, "--keep", str(folder)]
    command += ["--limit", str(limit)] + ["--rehearse"] * record.is_rehearsal
    log, started, outcome = folder / f"check-{check.name}.txt", time.perf_counter(), "interrupted"
    findings_path(folder, check.name).unlink(missing_ok=True)  # of an earlier command
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        process.wait(limit)
        outcome = "ended"
    except subprocess.TimeoutExpired:
        outcome = "timed out"
    finally:
        end_group(process)
        found = read_findings(folder, check.name)
        if outcome == "ended":
            outcome = judge(process.returncode, found["claims"])
        times = {"seconds": round(time.perf_counter() - started, 1), "limit_seconds": limit}
        said = log.read_text(errors="replace").strip()[-3000:]
        record.add(check.name, {"outcome": outcome, **times, **found, "said": said})
        print_check(check, record.values["checks"][check.name])


def judge(exit_code: int, claims: list[dict[str, Any]]) -> str:
    """What a check came to that has ended by itself; without a claim it has shown nothing."""
    results = [claim["passed"] for claim in claims]
    if exit_code != 0 or False in results or not results:
        return "failed"
    return "passed" if True in results else "needs CUDA"


def read_findings(folder: Path, name: str) -> dict[str, Any]:
    """What a check has written, however it ended."""
    path = findings_path(folder, name)
    if not path.is_file():
        return {"claims": [], "numbers": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a check and the runs that it has started, which share its group."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nobody is left
            break
        until = time.perf_counter() + patience
        while time.perf_counter() < until and is_alive(process):
            time.sleep(0.1)
    process.wait()


def is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether anybody of its group is."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- the table -------------------------------------------------------------------------------------


def print_check(check: Check, result: dict[str, Any]) -> None:
    """One line, and one for each claim that does not hold or was not looked at."""
    held = sum(claim["passed"] is True for claim in result["claims"])
    counted = f"{held} of {len(result['claims'])} claims hold"
    print(f"{result['outcome']:10} {check.name}: {counted}, {result['seconds']:.0f} s", flush=True)
    for claim in result["claims"]:
        if claim["passed"] is not True:
            numbers = {k: v for k, v in claim.items() if k not in ("claim", "passed")}
            word = "FAILED" if claim["passed"] is False else "unseen"
            print(f"{'':10}   {word}: {claim['claim']} {numbers}", flush=True)
    if result["outcome"] != "passed":
        print("\n".join(f"{'':10}   | {line}" for line in result["said"].splitlines()[-15:]))


def print_summary(record: Record) -> None:
    """Every check and every number that was measured."""
    print("\n| check | outcome | seconds |\n| --- | --- | --- |")
    for name, check in record.values["checks"].items():
        print(f"| {name}: {check['title']} | {check['outcome']} | {check.get('seconds', '')} |")
    print(f"\n{record.values['seconds']} s in all; {record.path}")


if __name__ == "__main__":
    sys.exit(main())
