"""What training with several processes costs: traffic, saves, leaving, going on, loading.

    python benchmarks/scale.py --out benchmarks/results/scale-cpu-DATE.json [--quick]
    python benchmarks/scale.py --tables benchmarks/results/scale-cpu-DATE.json

Runs traffic.py, saving.py and sharded_loading.py one after the other, keeps what they measured with
date, machine and versions, and prints the tables of the documentation. With ``--parts`` it measures
some of them again and keeps the others as the file has them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import on_paper
from processes import REPOSITORY
from quickstart import environment

HERE = Path(__file__).parent
PARTS = {
    "traffic": ["traffic.py"],
    "saving": ["saving.py"],
    "loading": ["sharded_loading.py", "--weights", "3.0e8", "--ranks", "2"],
}
QUICK = {
    "traffic": ["traffic.py", "--quick"],
    "saving": ["saving.py", "--strategy", "ddp"],
    "loading": ["sharded_loading.py", "--weights", "3.0e7", "--ranks", "2"],
}
"""Scripts and their words; of the quick ones only the counts mean anything."""
MIB = 2**20


def measure(words: Sequence[str]) -> dict[str, Any]:
    """What one script prints, and how busy the machine was.

    Raises:
        RuntimeError: if it fails; what it said is on this process's own error stream.
    """
    load, started = os.getloadavg()[0], time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(HERE / words[0]), *words[1:]],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}.")
    return {
        **environment(),
        "words": list(words),
        "seconds": time.perf_counter() - started,
        "load_average": [load, os.getloadavg()[0]],
        "measured": json.loads(done.stdout),
    }


def traffic_table(measured: dict[str, Any]) -> str:
    """Bytes and seconds of a step, one line a layout."""
    lines = [
        "| strategy | processes | micro-batches | sent by each, MB | counted / formula | "
        "received on loopback / expected of gloo | seconds a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in measured["runs"]:
        counted, expected = (
            sum(run[which].values()) for which in ("counted_bytes", "formula_bytes")
        )
        equal = f"{counted:,} / {expected:,}" if expected else "nothing"
        ratio = f"{run['loopback_over_gloo']:.3f}" if run["loopback_over_gloo"] else ""
        lines.append(
            f"| {run['strategy']} | {run['processes']} | {run['accumulation']} | "
            f"{run['sent_by_each_bytes'] / 1e6:.2f} | {equal} | {ratio} | "
            f"{run['seconds_per_step']:.2f} ({min(run['seconds']):.2f} to "
            f"{max(run['seconds']):.2f}) |"
        )
    return "\n".join(lines)


def saving_table(measured: dict[str, Any]) -> str:
    """Seconds around saves and signals, one column a layout."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "seconds between steps": lambda run: f"{run['seconds_between_steps']:.2f}",
        "pause of a save": lambda run: (
            f"{statistics.median(run['save_seconds']):.2f} "
            f"({min(run['save_seconds']):.2f} to {max(run['save_seconds']):.2f})"
        ),
        "pause of a run's first save": lambda run: f"{run['first_save_seconds']:.2f}",
        "checkpoint, MiB": lambda run: f"{run['checkpoint_bytes'] / MIB:.1f}",
        "SIGTERM until all is written": lambda run: _each(run["sigterm_to_written_seconds"]),
        "SIGTERM until the processes are gone": lambda run: _each(run["sigterm_to_exit_seconds"]),
        "exit codes": lambda run: ", ".join(
            str(code) for code in sorted({c for codes in run["exit_codes"] for c in codes})
        ),
        "restart until the first batch": lambda run: f"{run['restart_to_batch_seconds']:.1f}",
        "restart until that step is done": lambda run: f"{run['restart_to_step_seconds']:.1f}",
    }
    runs = measured["runs"]
    names = [f"{run['strategy']} on {run['processes']}" for run in runs]
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(runs)}"]
    lines += [f"| {name} | {' | '.join(map(of, runs))} |" for name, of in columns.items()]
    return "\n".join(lines)


def _each(seconds: list[float]) -> str:
    return ", ".join(f"{one:.1f}" for one in seconds)


def loading_table(measured: dict[str, Any]) -> str:
    """Peaks of anonymous memory, for a copy that is made and for one that is read."""
    lines = [
        "| packed copy | seconds | packed, MiB | peak, MiB | peak / packed | held, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("made", "read"):
        one = measured[name]
        lines.append(
            f"| {name} | {one['seconds']:.1f} | {one['packed_bytes'] / MIB:.0f} | "
            f"{one['peak_bytes'] / MIB:.0f} | {one['peak_over_packed']:.2f} | "
            f"{one['held_bytes'] / MIB:.0f} |"
        )
    return "\n".join(lines)


TABLES = {"traffic": traffic_table, "saving": saving_table, "loading": loading_table}


def tables(parts: dict[str, Any]) -> str:
    """Every table of what was measured, and that of what was computed."""
    texts = [TABLES[name](part["measured"]) for name, part in parts.items()]
    return "\n\n".join([*texts, on_paper.markdown(on_paper.table(accumulation=1))])


def main() -> None:
    """Measure and write, or print the tables of what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest of each, in minutes")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", type=Path, help="measure nothing; print these results' tables")
    arguments = parser.parse_args()
    if arguments.tables:
        print(tables(json.loads(arguments.tables.read_text())))
        return
    parts: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        parts = json.loads(arguments.out.read_text())
    for name in arguments.parts:
        parts[name] = measure((QUICK if arguments.quick else PARTS)[name])
        if arguments.out:  # what has been measured is kept if the next part fails
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(parts, indent=2) + "\n")
    print(tables({name: parts[name] for name in PARTS if name in parts}))


if __name__ == "__main__":
    main()
