"""What ``plan_memory`` predicts, held against what exists: bytes counted in real training steps.

    python benchmarks/memory_plan.py [--out benchmarks/results/memory-plan-cpu-DATE.json]
    python benchmarks/memory_plan.py --only llama --list
    python benchmarks/memory_plan.py --table benchmarks/results/memory-plan-cpu-DATE.json

Tiny models of several families, quantised and adapted by the project's own code, take one step on a
CPU. Weights, constants, adapters, gradients and optimizer state are counted tensor by tensor; what
is kept between forward and backward, and the most that exists at a time, storage by storage.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory_cases import CASES, Case
from memory_counting import Counted, count
from quickstart import environment

from qlora_pl.planning.memory.memory_plan import MemoryPlan, plan_memory
from qlora_pl.planning.shapes.model_shape import ModelShape, shape_from_config


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Predicted and counted bytes of one case."""

    name: str
    exact: dict[str, tuple[int, int]]
    """Component: predicted, counted; of what can be counted exactly."""
    kept: tuple[int, int]
    """Between forward and backward."""
    saved: int
    """Of the counted ones, those in autograd's saved tensors."""
    peak: tuple[int, int]
    """The most at a time, beside what stands."""

    @property
    def error(self) -> float:
        """Of what is kept: predicted over counted, less 1."""
        return self.kept[0] / self.kept[1] - 1

    @property
    def peak_error(self) -> float:
        """Likewise of the peak."""
        return self.peak[0] / self.peak[1] - 1


def compare(case: Case, folder: Path, counted: Counted | None = None) -> Comparison:
    """Plan a case and count it."""
    shape: ModelShape = shape_from_config(case.fields)
    setting = case.training
    plan = plan_memory(shape, setting)
    counted = counted or count(case, folder)
    standing = plan.moments["the optimizer's step"]
    return Comparison(
        name=case.name,
        exact={name: (standing[name], size) for name, size in counted.components.items()},
        kept=(plan.activations.kept(setting.gradient_checkpointing), counted.kept),
        saved=counted.saved,
        peak=(_predicted_peak(plan), counted.peak),
    )


def _predicted_peak(plan: MemoryPlan) -> int:
    passing = ("gradients", "activations", "logits_and_loss", "dequantization")
    return max(
        sum(parts[name] for name in passing)
        for moment, parts in plan.moments.items()
        if moment != "the optimizer's step"
    )


def table(comparisons: Sequence[dict[str, Any]]) -> str:
    """The cases of a results file as docs/memory.md shows them.

    Args:
        comparisons: The file's ``cases``.
    """
    lines = [
        "| case | counted exactly | kept: counted, error | peak: counted, error |",
        "| --- | --- | --- | --- |",
    ]
    for case in comparisons:
        total = sum(counted for _, counted in case["exact"].values())
        off = sum(abs(said - counted) for said, counted in case["exact"].values())
        lines.append(
            f"| {case['name']} | {total / 1e6:.2f} MB, off by {off} | "
            f"{case['kept'][1] / 1e6:.2f} MB {case['error']:+.1%} | "
            f"{case['peak'][1] / 1e6:.2f} MB {case['peak_error']:+.1%} |"
        )
    return "\n".join(lines)


def summary(comparisons: Sequence[dict[str, Any]]) -> str:
    """How far the plan is off over all cases of a results file, as a sentence."""
    exact = all(said == counted for case in comparisons for said, counted in case["exact"].values())
    kept, peaks = (  # + 0.0: of -0.0, which is none
        [round(case[name], 3) + 0.0 for case in comparisons] for name in ("error", "peak_error")
    )
    within = sum(abs(case["peak_error"]) <= 0.01 for case in comparisons)
    equal = "equal to the byte in all" if exact else "NOT equal in all"
    return (
        f"Of {len(comparisons)} settings, weights, constants, adapters, gradients and state are "
        f"{equal}; what is kept between forward and backward is off by {min(kept):+.1%} to "
        f"{max(kept):+.1%}; the most that exists at a time by {min(peaks):+.1%} to "
        f"{max(peaks):+.1%}, in {within} of them by less than 1 %."
    )


def line(result: Comparison) -> str:
    """A comparison as it is printed while the others are counted."""
    wrong = [name for name, (said, counted) in result.exact.items() if said != counted]
    return (
        f"{result.name:72} kept {result.kept[1] / 1e6:7.3f} MB {result.error:+7.2%}   "
        f"saved {result.saved / 1e6:7.3f}   peak {result.peak[1] / 1e6:7.3f} MB "
        f"{result.peak_error:+7.2%}   {f'NOT exact: {wrong}' if wrong else 'exact'}"
    )


def print_storages(result: Comparison, counted: Counted) -> None:
    """What was counted, storage by storage, and which components are not as predicted."""
    for name, (said, is_) in result.exact.items():
        if said != is_:
            print(name, said, is_)
    print(*(f"{size:9} {label}" for size, label in counted.listing), sep="\n")
    print("at the peak:")
    print(*(f"{size:9} {label}" for size, label in counted.at_peak[:40]), sep="\n")


def main() -> None:
    """Print a line for each case; write them to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="what is kept, storage by storage")
    parser.add_argument("--table", type=Path, help="print the table of a results file instead")
    arguments = parser.parse_args()
    if arguments.table is not None:
        cases = json.loads(arguments.table.read_text())["cases"]
        print(table(cases), summary(cases), sep="\n\n")
        return
    results = []
    for case in (its for its in CASES if arguments.only in its.name):
        with tempfile.TemporaryDirectory() as folder:
            counted = count(case, Path(folder))
            result = compare(case, Path(folder), counted)
        print(line(result), flush=True)
        if arguments.list:
            print_storages(result, counted)
        results.append(asdict(result) | {"error": result.error, "peak_error": result.peak_error})
    if arguments.out is not None:
        report = environment() | {"cases": results}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
