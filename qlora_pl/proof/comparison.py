"""Two runs' folders, compared byte by byte: what differs, at which step, and by how much.

Checkpoints are compared first in the order of cause (position before random numbers, random numbers
before the optimizer, the optimizer before the weights), so that the first difference explains most.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_pl.training.run_folders.run_folder import (
    checkpoint_path,
    checkpoints_newest_first,
    step_of,
)

PARTS = {
    "boundary": "position",
    "data": "data",
    "random_states": "random state",
    "lr_schedulers": "schedule",
    "optimizer_states": "optimizer state",
    "state_dict": "adapter",
    "loops": "loop counter",
    "epoch": "loop counter",
    "global_step": "loop counter",
}
"""Keys of a checkpoint that have a name of their own here, in the order of cause."""
ROW, FINAL = "metrics.csv", "final adapter"
ORDER = [*dict.fromkeys(PARTS.values()), ROW, FINAL]
HELD_OUT = "held_out.safetensors"
ARITHMETIC = ("optimizer state", "adapter", "callbacks", "scores", "saved_steps", ROW, FINAL)
"""Parts that rounding reaches; positions, random numbers and schedules it does not."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that two runs do not have in common."""

    step: int
    """Of the checkpoint or the row."""
    part: str
    """Which part of the run's state: one of ``ORDER``, or a key of the checkpoint."""
    name: str
    """Which thing in it: a tensor, a column, a counter."""
    largest: float | None = None
    """The largest difference of two numbers; None where a number would say nothing."""

    @property
    def is_arithmetic(self) -> bool:
        """Whether it may come of the order of additions alone."""
        return self.part in ARITHMETIC

    def sentence(self) -> str:
        """Where it is and how large, as the middle of a sentence."""
        if self.part == ROW:
            where = f"at step {self.step} in '{self.name}' of metrics.csv"
        elif self.part == FINAL:
            where = f"after the last step in '{self.name}' of the final adapter"
        else:
            where = f"at step {self.step} in the {self.part} of '{self.name}'"
        return where if self.largest is None else f"{where} (by up to {self.largest:.3g})"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared, and what differs, the first first."""

    differences: tuple[Difference, ...]
    num_adapter_tensors: int
    num_checkpoint_values: int
    """Tensors, numbers and words of the last checkpoint."""
    num_rows: int
    """Of metrics.csv."""
    steps: tuple[int, ...]
    """Whose checkpoints were compared."""

    @property
    def largest_in_adapter(self) -> float:
        """The largest difference of a weight of the final adapter."""
        found = [d.largest for d in self.differences if d.part == FINAL and d.largest is not None]
        return max(found, default=0.0)


def compare_runs(first: Path, second: Path) -> Comparison:
    """Compare two finished runs' folders.

    Raises:
        OSError: if one lacks what a finished run has.
    """
    found: list[Difference] = []
    steps = sorted(_steps(first) & _steps(second))
    num_values = 0
    for step in steps:
        old, new = _read(first, step), _read(second, step)
        num_values = sum(1 for _ in leaves(old))
        found += compare_checkpoints(old, new, step)
    last = max(_steps(first) | _steps(second), default=0)
    rows = read_rows(first / "metrics.csv")
    found += compare_rows(rows, read_rows(second / "metrics.csv"))
    weights = _final_weights(first)
    found += compare_tensors(weights, _final_weights(second), last)
    if not steps or steps[-1] != last:
        lacks = f"a checkpoint of step {last} in both runs"
        found.append(Difference(step=last, part="checkpoints", name=lacks))
    return Comparison(
        differences=tuple(sorted(found, key=_rank)),
        num_adapter_tensors=len(weights),
        num_checkpoint_values=num_values,
        num_rows=len(rows),
        steps=tuple(steps),
    )


def compare_checkpoints(
    first: Mapping[str, Any], second: Mapping[str, Any], step: int
) -> list[Difference]:
    """Everything in two checkpoints but what measures time."""
    pair = dict(leaves(first)), dict(leaves(second))
    return [
        Difference(
            step=step,
            part=part,
            name=name,
            largest=None if part == "random state" else _distance(a, b),
        )
        for (part, name), a, b in _side_by_side(*pair)
        if not is_measured(name) and not _same(a, b)
    ]


def compare_tensors(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], step: int
) -> list[Difference]:
    """The tensors of two final adapters."""
    return [
        Difference(step=step, part=FINAL, name=name, largest=_distance(a, b))
        for name, a, b in _side_by_side(first, second)
        if not _same(a, b)
    ]


def compare_rows(first: list[dict[str, str]], second: list[dict[str, str]]) -> Iterator[Difference]:
    """Two histories, row by row; a step that only one of them has differs as a whole."""
    steps = [[int(row["step"]) for row in rows] for rows in (first, second)]
    if steps[0] != steps[1]:
        place = next(i for i in range(len(steps[0]) + 1) if steps[0][i : i + 1] != steps[1][i:][:1])
        step = (steps[0][place:] or steps[1][place:])[0]
        yield Difference(step=step, part=ROW, name="the row itself")
        return
    for a, b in zip(first, second, strict=True):
        for name, old, new in _side_by_side(a, b):
            if old != new and not is_measured(name):
                largest = _distance_of_texts(old, new)
                yield Difference(step=int(a["step"]), part=ROW, name=name, largest=largest)


def is_measured(name: str) -> bool:
    """Whether a value is a measurement of time or of memory, which no two runs share."""
    return re.search(r"(^|[._])seconds$|per_second$|(^|\.)memory/", name) is not None


def leaves(checkpoint: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    """Every tensor, number and word of a checkpoint with its part and its name in it."""
    for key, value in checkpoint.items():
        part = PARTS.get(key, key)
        for path, leaf in _walk(value, ()):
            yield (part, _name(key, path)), leaf


def _name(key: str, path: tuple[str, ...]) -> str:
    if key == "optimizer_states" and path[1:2] == ("state",) and len(path) >= 4:
        return f"{path[2]} ({'.'.join(path[3:])})"
    if key == "random_states" and len(path) >= 2:
        return f"rank {path[0]} ({'.'.join(path[1:])})"
    return ".".join(path) or key


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    is_numbers = isinstance(value, list | tuple) and all(type(item) is int for item in value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, (*path, str(key)))
    elif isinstance(value, list | tuple) and not is_numbers:
        for index, inner in enumerate(value):
            yield from _walk(inner, (*path, str(index)))
    else:  # a list of whole numbers is one thing: a generator's state, the steps kept
        yield path, value


_MISSING = object()


def _side_by_side(first: Mapping[Any, Any], second: Mapping[Any, Any]) -> Iterator[tuple]:
    for name in [*first, *(name for name in second if name not in first)]:
        yield name, first.get(name, _MISSING), second.get(name, _MISSING)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return type(a) is type(b) and bool(a == b)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _distance(a: Any, b: Any) -> float | None:
    """The largest difference of two numbers; None for words, states and other shapes."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.is_complex() or not a.numel():
            return None
        return float((a.double() - b.double()).abs().nan_to_num(nan=math.inf).max())
    if isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool):
        return abs(float(a) - float(b))
    return None


def _distance_of_texts(a: Any, b: Any) -> float | None:
    try:
        return abs(float(a) - float(b))
    except (TypeError, ValueError):  # an empty cell, or none
        return None


def _rank(difference: Difference) -> tuple[int, int, str]:
    place = ORDER.index(difference.part) if difference.part in ORDER else ORDER.index(ROW) - 1
    return (difference.step, place, "" if difference.part == FINAL else difference.name)


# -- reading ---------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv`` as text, so that every digit counts."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _steps(run: Path) -> set[int]:
    return {step_of(path) for path in checkpoints_newest_first(run)}


def _read(run: Path, step: int) -> dict[str, Any]:
    path = checkpoint_path(run, step)
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def _final_weights(run: Path) -> dict[str, Tensor]:
    """Of the adapter, or of the model if the base was trained whole."""
    from safetensors.torch import load_file

    folder = run / "adapter" if (run / "adapter").is_dir() else run / "model"
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {} if path.name == HELD_OUT else load_file(path)
    if not tensors:
        raise FileNotFoundError(f"'{run}' has no finished adapter")
    return tensors
