"""``GridFile``: a question put as a grid of runs, in one YAML.

question: Does a higher rank help, and does it matter how the base is stored?
base: ../quickstart.yaml
axes:
  rank: {key: model.lora.r, values: [8, 64], ordered: true}
  type: {key: model.quantization.quant_type, values: [nf4, fp4, none]}
seeds: [0, 1, 2]
metric: {name: val/loss, better: lower}
comparisons: {reference: {rank: 64, type: nf4}}
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora_pl.ablation.grid.strict_yaml import load_mapping, section
from qlora_pl.errors import ConfigurationError

MOST_VALUES = 1000
"""Of one axis; a range that gives more has a step of the wrong size."""


@dataclass(frozen=True, kw_only=True)
class RangeConfig:
    """Values from one number to another."""

    first: float
    last: float
    """Itself a value, if the steps meet it."""
    step: float | None = None
    """Added each time."""
    factor: float | None = None
    """Multiplied with each time; one of both is given."""

    def __post_init__(self) -> None:
        if (self.step is None) == (self.factor is None):
            raise ConfigurationError("give either step or factor.")
        if not all(map(math.isfinite, (self.first, self.last))):
            raise ConfigurationError("first and last must be finite numbers.")
        if self.step is not None and not self.step * (self.last - self.first) > 0:
            raise ConfigurationError(
                f"step: {self.step:g} does not lead from {self.first:g} to {self.last:g}."
            )
        if self.factor is not None and not self._factor_leads():
            raise ConfigurationError(
                f"factor: {self.factor:g} does not lead from {self.first:g} to {self.last:g}."
            )
        if len(self.values()) > MOST_VALUES:
            raise ConfigurationError(f"gives more than {MOST_VALUES} values; take larger steps.")

    def _factor_leads(self) -> bool:
        assert self.factor is not None
        if self.factor <= 0 or self.factor == 1 or self.first * self.last <= 0:
            return False
        return (self.factor > 1) == (abs(self.last) > abs(self.first))

    def values(self) -> list[int | float]:
        """All of them; whole numbers where they are whole."""
        values: list[int | float] = []
        slack = 1e-9 * max(abs(self.first), abs(self.last))
        low, high = sorted((self.first, self.last))
        while len(values) <= MOST_VALUES:
            number = len(values)
            value = (
                self.first + number * self.step
                if self.step is not None
                else self.first * (self.factor or 1.0) ** number
            )
            if not low - slack <= value <= high + slack:
                break
            value = float(f"{value:.12g}")
            values.append(int(value) if value.is_integer() and abs(value) >= 1 else value)
        return values


@dataclass(frozen=True, kw_only=True)
class AxisConfig:
    """What is varied: one key, or several that move together."""

    key: str | None = None
    """Of the training file, dotted."""
    values: tuple[Any, ...] | RangeConfig | None = None
    """What it takes."""
    levels: dict[str, dict[str, Any]] | None = None
    """In place of both: a name for each level, and the keys that it sets."""
    ordered: bool = False
    """Whether the levels have an order, given by the file's, so that a trend can be asked for."""

    def __post_init__(self) -> None:
        if self.levels is None and (self.key is None or self.values is None):
            raise ConfigurationError("give key and values, or levels.")
        if self.levels is not None and not (self.key is None and self.values is None):
            raise ConfigurationError("has levels, so that key and values say nothing; remove them.")
        if self.levels is not None and any(not keys for keys in self.levels.values()):
            empty = next(name for name, keys in self.levels.items() if not keys)
            raise ConfigurationError(f"levels.{empty}: sets nothing.")
        if (isinstance(self.values, tuple) and not self.values) or self.levels == {}:
            raise ConfigurationError("has no values.")


@dataclass(frozen=True, kw_only=True)
class OverrideConfig:
    """Keys that some cells set otherwise."""

    when: dict[str, Any]
    """Axis -> value; a cell is meant that has all of them."""
    set: dict[str, Any]
    """Key -> value."""


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """By what cells are judged."""

    name: str = "val/loss"
    """As in a run's metrics.json."""
    better: Literal["lower", "higher"] = "lower"
    """Which way is good."""
    unit: str = "nats"
    """For the report."""


@dataclass(frozen=True, kw_only=True)
class ComparisonsConfig:
    """Which differences are asked for; each more widens all simultaneous intervals."""

    reference: dict[str, Any] | None = None
    """Axis -> value of the cell with which every other one is compared."""
    all_pairs: bool = False
    """Whether every cell is compared with every other instead."""
    trends: tuple[str, ...] = ()
    """Ordered axes along which the metric may rise or fall."""
    margin: float | None = None
    """Difference, in the metric's unit, within which cells count as equally good."""

    def __post_init__(self) -> None:
        if self.reference is not None and self.all_pairs:
            raise ConfigurationError("reference: all_pairs compares every pair already; drop one.")
        if self.margin is not None and not self.margin > 0:
            raise ConfigurationError(f"margin: must be above 0, got {self.margin:g}.")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What a grid may cost; more is refused before anything starts."""

    runs: int | None = None
    hours: float | None = None
    """Of all devices together."""

    def __post_init__(self) -> None:
        for name, value in (("runs", self.runs), ("hours", self.hours)):
            if value is not None and not value > 0:
                raise ConfigurationError(f"{name}: must be above 0, got {value:g}.")


@dataclass(frozen=True, kw_only=True)
class GridFile:
    """A grid as its author wrote it."""

    question: str
    """What is to be found out; the report's heading."""
    base: str | tuple[str, ...]
    """Files for ``--config`` of every run, in their order; beside this file."""
    axes: dict[str, AxisConfig]
    """What is varied; every combination is a cell."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys that every cell sets."""
    seeds: tuple[int, ...] = (0,)
    """``seed_everything`` of each cell's runs; the same seeds are paired."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations that are left out: axis -> value."""
    overrides: tuple[OverrideConfig, ...] = ()
    """Keys that some cells set otherwise."""
    metric: MetricConfig = field(default_factory=MetricConfig)
    comparisons: ComparisonsConfig = field(default_factory=ComparisonsConfig)
    level: float = 0.95
    """Of confidence, everywhere."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self) -> None:
        problems = []
        if not self.question.strip():
            problems.append("question: say what the grid is to find out.")
        if not self.base:
            problems.append("base: names no file.")
        if not self.seeds:
            problems.append("seeds: a run needs a seed; write [0].")
        twice = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        problems += [f"seeds: {seed} stands twice." for seed in twice]
        if not 0.5 <= self.level < 1:
            problems.append(f"level: must lie in 0.5 to 1, without 1, got {self.level:g}.")
        for name in self.axes:
            if not re.fullmatch(r"[A-Za-z][\w ]*", name):
                problems.append(f"axes.{name}: call it by letters, digits and '_'.")
        for name in self.comparisons.trends:
            if name not in self.axes:
                problems.append(f"comparisons.trends: no axis is called '{name}'.")
            elif not self.axes[name].ordered:
                problems.append(
                    f"comparisons.trends: axis '{name}' has no order; set its ordered: true."
                )
        if problems:
            raise ConfigurationError(problems)


def read_grid(path: Path) -> GridFile:
    """A grid file with its types checked; what its keys mean to a run is checked with its cells.

    Raises:
        ConfigurationError: with every problem found.
    """
    problems: list[str] = []
    grid = section(GridFile, load_mapping(path), "", problems)
    if grid is None or problems:
        raise ConfigurationError([f"{path}: {problem}" for problem in problems])
    return grid
