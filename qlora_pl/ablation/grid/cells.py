"""A grid file -> its cells: every combination of the axes' levels that is not excluded.

A cell's name is short, so that it can be read in a table, and says what varies; what a cell *is* is
said by the digest of its resolved configuration (``identity``).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_pl.ablation.grid.grid_file import AxisConfig, GridFile, RangeConfig
from qlora_pl.errors import ConfigurationError, did_you_mean

OWN_KEYS = {
    "seed_everything": "seeds says it",
    "run.name": "every run of a grid has a folder of its own",
    "run.root": "every run of a grid has a folder of its own",
    "ckpt_path": "a grid resumes its runs by itself",
}
"""Keys that a grid sets for its runs."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One value of an axis."""

    label: str
    """As in the file, in short; what exclusions and the reference name it by."""
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of levels; its runs differ in their seed alone."""

    name: str
    levels: Mapping[str, str]
    """Axis -> label."""
    settings: Mapping[str, Any]
    """Key -> value, over the base: what all cells set, then its levels, then overrides."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid file with its cells."""

    file: GridFile
    axes: Mapping[str, tuple[Level, ...]]
    cells: tuple[Cell, ...]
    reference: str | None
    """Name of the cell with which the others are compared."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(cell, reference) of every comparison that was asked for."""
        names = [cell.name for cell in self.cells]
        if self.file.comparisons.all_pairs:
            return [(other, one) for one, other in itertools.combinations(names, 2)]
        return [(name, self.reference) for name in names if self.reference not in (None, name)]


def make_grid(file: GridFile) -> Grid:
    """Every cell of a grid file.

    Raises:
        ConfigurationError: with every axis, exclusion, override or comparison that means nothing,
            and every key that two of them would set.
    """
    problems: list[str] = []
    axes = {name: _levels(axis) for name, axis in file.axes.items()}
    problems += _clashes(file, axes)
    choices = [("exclude", one) for one in file.exclude]
    choices += [("overrides.when", one.when) for one in file.overrides]
    if file.comparisons.reference is not None:
        choices.append(("comparisons.reference", file.comparisons.reference))
    for place, choice in choices:
        problems += _unknown_levels(place, choice, axes)
    if problems:
        raise ConfigurationError(problems)
    combinations = [
        dict(zip(axes, levels, strict=True)) for levels in itertools.product(*axes.values())
    ]
    kept = [one for one in combinations if not any(_fits(one, out) for out in file.exclude)]
    if not kept:
        raise ConfigurationError("exclude: leaves no cell.")
    for number, out in enumerate(file.exclude):
        if not any(_fits(one, out) for one in combinations):
            problems.append(f"exclude[{number}]: no cell is like that.")
    for number, override in enumerate(file.overrides):
        if not any(_fits(one, override.when) for one in kept):
            problems.append(f"overrides[{number}]: no cell is like that.")
    counts = Counter(level.label for levels in axes.values() for level in levels)
    cells = tuple(_cell(file, one, counts) for one in kept)
    problems += _duplicates(cells)
    reference, wrong = _reference(file, kept, cells)
    if problems := [*problems, *wrong]:
        raise ConfigurationError(problems)
    return Grid(file=file, axes=axes, cells=cells, reference=reference)


def _levels(axis: AxisConfig) -> tuple[Level, ...]:
    if axis.levels is not None:
        return tuple(Level(label=name, settings=keys) for name, keys in axis.levels.items())
    assert axis.key is not None
    assert axis.values is not None
    values = axis.values.values() if isinstance(axis.values, RangeConfig) else axis.values
    return tuple(Level(label=label_of(value), settings={axis.key: value}) for value in values)


def label_of(value: Any) -> str:
    """A value in short: numbers without zeros that say nothing, the rest as JSON has it."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return value if isinstance(value, str) else json.dumps(value)


def _clashes(file: GridFile, axes: Mapping[str, tuple[Level, ...]]) -> list[str]:
    problems = []
    setters = {
        **{
            f"axes.{name}": {k for one in levels for k in one.settings}
            for name, levels in axes.items()
        },
        "set": set(file.set),
    }
    for (one, keys), (other, others) in itertools.combinations(setters.items(), 2):
        for first, second in itertools.product(sorted(keys), sorted(others)):
            if f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}."):
                problems.append(f"{other}: sets {second}, as {one} does; one would undo the other.")
    setters["overrides"] = {key for one in file.overrides for key in one.set}
    for place, keys in setters.items():
        problems += [
            f"{place}: {key} is the grid's own ({OWN_KEYS[key]})."
            for key in sorted(keys & set(OWN_KEYS))
        ]
    for name, levels in axes.items():
        counts = Counter(level.label for level in levels)
        problems += [
            f"axes.{name}: {label} stands twice." for label, count in counts.items() if count > 1
        ]
    return problems


def _unknown_levels(
    place: str, choice: Mapping[str, Any], axes: Mapping[str, tuple[Level, ...]]
) -> list[str]:
    problems = []
    for axis, wanted in choice.items():
        if axis not in axes:
            problems.append(f"{place}: no axis is called '{axis}'{did_you_mean(axis, axes)}")
            continue
        known = [level.label for level in axes[axis]]
        for value in wanted if isinstance(wanted, list) else [wanted]:
            if label_of(value) not in known:
                problems.append(
                    f"{place}: axis '{axis}' has no {label_of(value)} (it has {', '.join(known)})."
                )
    return problems


def _fits(combination: Mapping[str, Level], choice: Mapping[str, Any]) -> bool:
    return all(
        combination[axis].label in [label_of(v) for v in (w if isinstance(w, list) else [w])]
        for axis, w in choice.items()
    )


def _speaks_for_itself(label: str, counts: Mapping[str, int]) -> bool:
    # Numbers, yes, no and none need the axis's name before them, as do labels of two axes.
    is_word = re.match(r"[A-Za-z]", label) and label not in ("true", "false", "null", "none")
    return bool(is_word) and counts[label] == 1


def _cell(file: GridFile, combination: Mapping[str, Level], counts: Mapping[str, int]) -> Cell:
    settings: dict[str, Any] = dict(file.set)
    for level in combination.values():
        settings |= level.settings
    for override in file.overrides:
        if _fits(combination, override.when):
            settings |= override.set
    parts = [
        level.label if _speaks_for_itself(level.label, counts) else f"{axis}{level.label}"
        for axis, level in combination.items()
    ]
    name = "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") for part in parts)
    return Cell(
        name=name or "all",
        levels={axis: level.label for axis, level in combination.items()},
        settings=settings,
    )


def _duplicates(cells: tuple[Cell, ...]) -> list[str]:
    problems = []
    seen: dict[str, str] = {}
    for cell in cells:
        text = json.dumps(cell.settings, sort_keys=True, default=str)
        if text in seen:
            problems.append(f"cells {seen[text]} and {cell.name} are the same run; drop one.")
        seen.setdefault(text, cell.name)
    counts = Counter(cell.name for cell in cells)
    problems += [
        f"axes: {count} cells would be called {name}; give the values other names in levels."
        for name, count in counts.items()
        if count > 1
    ]
    return problems


def _reference(
    file: GridFile, kept: list[dict[str, Level]], cells: tuple[Cell, ...]
) -> tuple[str | None, list[str]]:
    choice = file.comparisons.reference
    if choice is None:
        return None, []
    if missing := [axis for axis in file.axes if axis not in choice]:
        return None, [f"comparisons.reference: says nothing of axis '{missing[0]}'; name one cell."]
    for combination, cell in zip(kept, cells, strict=True):
        if _fits(combination, choice):
            return cell.name, []
    return None, [
        "comparisons.reference: that cell is excluded, so nothing can be compared with it."
    ]
