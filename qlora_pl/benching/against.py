"""This program and another over the same packed weights and the same rows, in turn: A B A B.

Each turn is a process of its own. A ratio is stated only where this program's own turns agree:
what differs between them is the machine's doing, and would be taken for a difference of programs.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_pl.benching.report import gigabytes, seconds, title
from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.errors import ConfigurationError, TrainingStoppedError

logger = logging.getLogger(__name__)

OWN = "qlora_pl"
LEAST_TURNS = 2
"""Of each program: one alone says nothing about the machine."""
TOLERATED = 0.03
"""How far the turns of this program may lie apart for a ratio to be stated."""
TOLERATED_LOSS = 1e-2
"""Relative difference of the programs' losses over the first steps: adapters start at other random
numbers, and products are rounded elsewhere."""
COMPARED_LOSSES = 10


def compare(
    workload: Workload, timing: Timing, program: str, accumulation: int | None
) -> dict[str, Any]:
    """Measure both in turn, and return the record.

    Args:
        workload: What is trained.
        timing: Its repeats are the turns of each program, 2 at least.
        program: ``hf`` or ``trl``.
        accumulation: Into how many micro-batches the other program cuts a step; None: as many as
            this one.

    Raises:
        ConfigurationError: for what cannot be compared.
        TrainingStoppedError: if a turn fails.
    """
    if accumulation is not None and (accumulation < 1 or program != "hf"):
        raise ConfigurationError(
            f"--against-accumulation: must be at least 1, got {accumulation}."
            if accumulation < 1
            else "--against-accumulation: TRL is given the same packs as here; leave it out."
        )
    turns = max(LEAST_TURNS, timing.repeats)
    of_turn = replace(timing, repeats=1, profiled=0)
    results: dict[str, list[dict[str, Any]]] = {OWN: [], program: []}
    with tempfile.TemporaryDirectory(prefix="qlora-pl-bench-") as temporary:
        folder = Path(temporary)
        spec = {
            "workload": workload.to_plain(),
            "timing": vars(of_turn),
            "accumulation": accumulation or workload.accumulation,
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        run_worker("prepare", folder)
        for turn in range(turns):
            for backend in results:
                logger.warning("turn %d of %d: %s", turn + 1, turns, backend)
                results[backend].append(run_worker(backend, folder))
    return comparison(results[OWN], results[program], program) | {
        "workload": workload.to_plain(),
        "timing": vars(of_turn) | {"turns": turns, "follows_protocol": timing.follows_protocol},
        "their_micro_batches": accumulation or workload.accumulation,
    }


def run_worker(backend: str, folder: Path) -> dict[str, Any]:
    """One process: prepare the files, or measure one program over them.

    Raises:
        ConfigurationError: if it was a mistake in the words.
        TrainingStoppedError: if it failed otherwise.
    """
    words = [sys.executable, "-m", "qlora_pl", "bench", "--worker", backend, str(folder)]
    # What is said goes to a file: a full pipe would stop the process that is measured.
    with (folder / f"{backend}.log").open("w+") as log:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.seek(0)
        said = log.read().strip().splitlines()
    if done.returncode == 0:
        result: dict[str, Any] = json.loads((folder / f"{backend}.json").read_text())
        return result
    told = [line.removeprefix("qlora-pl: ") for line in said if line.startswith("qlora-pl: ")]
    if done.returncode == 2 and told:
        raise ConfigurationError(told)
    last = told[-1] if told else (said or ["it said nothing"])[-1]
    raise TrainingStoppedError(
        f"--against: {backend} ended with exit code {done.returncode}: {last}"
    )


def comparison(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], program: str
) -> dict[str, Any]:
    """The turns of both -> medians, their ratio, and whether it may be stated."""
    rates = {OWN: _rates(ours), program: _rates(theirs)}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    noise = {name: max(values) / min(values) - 1 for name, values in rates.items()}
    pairs = [a / b for a, b in zip(rates[OWN], rates[program], strict=True)]
    refused = None
    if noise[OWN] > TOLERATED:
        refused = (
            f"this program's own turns lie {noise[OWN]:.1%} apart, more than {TOLERATED:.0%}, so "
            "no ratio is stated; measure on a machine that does nothing else, or take more steps"
        )
    elif ours[0]["tokens_of_steps"] != theirs[0]["tokens_of_steps"]:
        refused = "the programs did not train on the same tokens, so no ratio is stated"
    losses = [
        abs(a - b) / abs(a) for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=False)
    ][:COMPARED_LOSSES]
    return {
        "record": "qlora-pl bench comparison",
        "format": 1,
        "against": program,
        "tokens_per_second": rates,
        "medians": medians,
        "noise": noise,
        "ratio": None if refused else medians[OWN] / medians[program],
        "ratio_of_pairs": None if refused else pairs,
        "refused": refused,
        "largest_relative_difference_of_losses": max(losses),
        "losses_agree": max(losses) <= TOLERATED_LOSS,
        "environment": ours[-1]["environment"],
        "turns": {OWN: list(ours), program: list(theirs)},
    }


def _rates(turns: Sequence[Mapping[str, Any]]) -> list[float]:
    return [turn["tokens_per_second"] for turn in turns]


def comparison_report(record: Mapping[str, Any]) -> str:
    """What the comparison came to, in some lines."""
    program = record["against"]
    lines = [
        f"bench: {title(record)}",
        f"  {record['environment']['device']}, {record['environment']['date']}",
        "",
        f"  {'':14}{'tokens/s':>10}  {'turns apart':>11}  {'step':>10}  peak",
    ]
    for name in (OWN, program):
        turns = record["turns"][name]
        step = statistics.median(turn["step_seconds"]["median"] for turn in turns)
        peak = max(turn["peak"].get("reserved", turn["peak"].get("resident", 0)) for turn in turns)
        lines.append(
            f"  {name:14}{record['medians'][name]:>10,.1f}  {record['noise'][name]:>11.1%}  "
            f"{seconds(step):>10}  {gigabytes(peak)}"
        )
    lines.append("")
    if record["refused"]:
        lines.append(f"bench: {record['refused']}.")
    else:
        pairs = record["ratio_of_pairs"]
        lines.append(
            f"bench: {record['ratio']:.2f} times the tokens/s of {program} (turn by turn "
            f"{min(pairs):.2f} to {max(pairs):.2f}; this program's turns "
            f"{record['noise'][OWN]:.1%} apart)."
        )
    difference = record["largest_relative_difference_of_losses"]
    if not record["losses_agree"]:
        lines.append(
            f"bench: do not quote this: their losses differ by {difference:.1%}, so they do not "
            "compute the same."
        )
    if not record["timing"]["follows_protocol"]:
        lines.append("bench: fewer than 5 steps of warm-up or 20 timed ones: not for a figure.")
    return "\n".join(lines)
