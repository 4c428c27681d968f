"""Results of runs -> every number of a report; nothing of time, place or order of finishing.

Made from what the runs left behind alone, so that a report made again is the same, byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from qlora_pl.ablation.grid.cells import Grid
from qlora_pl.ablation.running.grid_folder import GridEntry, GridFolder
from qlora_pl.ablation.running.store import Result, RunState
from qlora_pl.ablation.statistics.differences import Difference, Interval, compare, t_interval
from qlora_pl.ablation.statistics.equivalence import Equivalence, equivalence
from qlora_pl.ablation.statistics.trends import Trend, trend
from qlora_pl.errors import AblationError

MEMORY, TIME, TOKENS = "memory/peak_allocated_gib", "training_seconds", "tokens_per_second"


@dataclass(frozen=True, kw_only=True)
class RunNumbers:
    """One run, however it ended."""

    entry: GridEntry
    state: RunState
    value: float | None
    """Of the grid's metric; None where there is none that is a number."""
    why_not: str | None
    """Why there is none."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    curves: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class CellNumbers:
    """One cell over its seeds."""

    name: str
    levels: Mapping[str, str]
    values: Mapping[int, float]
    """Seed -> metric, of what was finished."""
    mean: float | None
    interval: Interval | None
    """Of the mean over seeds, single; None with one seed."""
    memory_gib: float | None
    """Peak, the largest of its runs."""
    minutes: float | None
    """Of training alone, mean over its runs."""


@dataclass(frozen=True, kw_only=True)
class GridNumbers:
    """Everything that a report says."""

    grid: Grid
    runs: tuple[RunNumbers, ...]
    cells: tuple[CellNumbers, ...]
    differences: tuple[Difference, ...]
    trends: tuple[Trend, ...]
    equivalences: tuple[Equivalence, ...]
    codes: tuple[str, ...]
    """``identity.code_version`` of all runs."""

    @property
    def failed(self) -> list[RunNumbers]:
        """Runs without a value."""
        return [run for run in self.runs if run.value is None]


def numbers_of(grid: Grid, folder: GridFolder, entries: Sequence[GridEntry]) -> GridNumbers:
    """Every number of a report.

    Args:
        grid: What was asked.
        folder: Where its runs are named.
        entries: The runs.

    Raises:
        AblationError: if no run logged the metric, naming what they did log.
    """
    runs = tuple(_run_numbers(grid, folder, entry) for entry in entries)
    _refuse_unlogged(grid, runs)
    values: dict[str, dict[int, float]] = {cell.name: {} for cell in grid.cells}
    for run in runs:
        if run.value is not None:
            values.setdefault(run.entry.cell, {})[run.entry.seed] = run.value
    level = grid.file.level
    differences = compare(values, grid.pairs, level)
    margin = grid.file.comparisons.margin
    tested = [one for one in differences if one.sd is not None]
    return GridNumbers(
        grid=grid,
        runs=runs,
        cells=tuple(_cell_numbers(grid, cell.name, runs, values, level) for cell in grid.cells),
        differences=tuple(differences),
        trends=tuple(_trends(grid, values)),
        equivalences=tuple(equivalence(one, margin, len(tested)) for one in tested)
        if margin
        else (),
        codes=tuple(sorted({code for run in runs for code in run.state.codes})),
    )


def _run_numbers(grid: Grid, folder: GridFolder, entry: GridEntry) -> RunNumbers:
    home = folder.home(entry)
    state = home.state()
    if state.kind != "finished":
        return RunNumbers(
            entry=entry, state=state, value=None, why_not=f"{state.kind}: {state.why or ''}"
        )
    try:
        result: Result = home.result()
    except AblationError as error:
        return RunNumbers(entry=entry, state=state, value=None, why_not=str(error))
    found = result.metrics.get(grid.file.metric.name)
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    why_not = None
    if not is_number:
        why_not = f"no {grid.file.metric.name} was logged"
    elif not math.isfinite(found):  # type: ignore[arg-type]
        why_not = f"{grid.file.metric.name} is {found}"
    return RunNumbers(
        entry=entry,
        state=state,
        value=None if why_not else float(found),  # type: ignore[arg-type]
        why_not=why_not,
        metrics=result.metrics,
        curves=result.curves,
    )


def _refuse_unlogged(grid: Grid, runs: Sequence[RunNumbers]) -> None:
    name = grid.file.metric.name
    finished = [run for run in runs if run.metrics]
    if finished and all(name not in run.metrics for run in finished):
        known = sorted(
            key
            for key, value in finished[0].metrics.items()
            if isinstance(value, float) and not key.startswith(("memory", "throughput"))
        )
        raise AblationError(f"metric.name: no run logged '{name}'; there are {', '.join(known)}.")


def _cell_numbers(
    grid: Grid,
    name: str,
    runs: Sequence[RunNumbers],
    values: Mapping[str, Mapping[int, float]],
    level: float,
) -> CellNumbers:
    own = [run for run in runs if run.entry.cell == name]
    found = dict(sorted(values[name].items()))
    memory = [run.metrics[MEMORY] for run in own if MEMORY in run.metrics]
    seconds = [run.metrics[TIME] for run in own if TIME in run.metrics]
    numbers = list(found.values())
    has_spread = len(set(numbers)) > 1
    return CellNumbers(
        name=name,
        levels=next(cell.levels for cell in grid.cells if cell.name == name),
        values=found,
        mean=mean(numbers) if numbers else None,
        interval=t_interval(numbers, level) if has_spread else None,
        memory_gib=max(memory) if memory else None,
        minutes=mean(seconds) / 60 if seconds else None,
    )


def _trends(grid: Grid, values: Mapping[str, Mapping[int, float]]) -> list[Trend]:
    """One for each axis that was asked for: over all other axes and seeds, each a block."""
    found = []
    for axis in grid.file.comparisons.trends:
        blocks: dict[str, dict[int, float]] = {level.label: {} for level in grid.axes[axis]}
        others = list(
            dict.fromkeys(
                tuple((name, label) for name, label in cell.levels.items() if name != axis)
                for cell in grid.cells
            )
        )
        for cell in grid.cells:
            rest = tuple((name, label) for name, label in cell.levels.items() if name != axis)
            for seed, value in values[cell.name].items():
                blocks[cell.levels[axis]][others.index(rest) * 10_000_019 + seed] = value
        one = trend(axis, [level.label for level in grid.axes[axis]], blocks)
        if one is not None:
            found.append(one)
    return found
