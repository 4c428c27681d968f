"""Every run of a grid as ``fit`` would understand it, all mistakes found before anything starts.

Building the parser takes seconds and a further parse a tenth, so one parser reads all runs. A cell
is parsed once, with its first seed: its runs differ in nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qlora_pl.ablation.grid.cells import Cell, Grid
from qlora_pl.ablation.grid.identity import data_digest, identity_of
from qlora_pl.cli import RunConfigs
from qlora_pl.errors import ConfigurationError
from qlora_pl.run_checks import flat_values


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """One run: a cell with a seed."""

    cell: Cell
    seed: int
    identity: str
    """Digest of what the run is; see ``identity``."""
    words: tuple[str, ...]
    """For ``qlora-pl fit``, without where it writes."""
    config: Mapping[str, Any]
    """The whole resolved configuration, with dotted keys."""
    parsed: Any
    """The same as the parser gives it, with the cell's first seed."""

    @property
    def name(self) -> str:
        """The cell's, with the seed."""
        return f"{self.cell.name}-seed{self.seed}"


def words_of(files: Sequence[Path], cell: Cell, seed: int, machine: Path | None) -> list[str]:
    """What ``qlora-pl fit`` is given for a run.

    Args:
        files: For ``--config``, in their order.
        cell: Whose settings follow as flags.
        seed: For ``seed_everything``.
        machine: For ``--trainer``: devices, strategy.
    """
    words = [word for file in files for word in ("--config", str(file))]
    words += ["--trainer", str(machine)] if machine else []
    for key, value in cell.settings.items():
        words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    return [*words, f"--seed_everything={seed}"]


def resolve(grid: Grid, files: Sequence[Path], machine: Path | None = None) -> list[GridRun]:
    """All runs of a grid, cell by cell.

    Args:
        grid: See ``cells.make_grid``.
        files: For ``--config`` of every run.
        machine: For ``--trainer`` of every run.

    Raises:
        ConfigurationError: with every mistake of every cell; one that all cells share is told once.
    """
    first_seed = grid.file.seeds[0]
    words = [words_of(files, cell, first_seed, machine) for cell in grid.cells]
    configs: list[Any] = []
    problems: dict[str, list[str]] = {}
    for cell, found in zip(grid.cells, _parsed(words), strict=True):
        if isinstance(found, ConfigurationError):
            for problem in found.problems:
                problems.setdefault(problem, []).append(cell.name)
        else:
            configs.append(found)
    if problems:
        raise ConfigurationError(
            [_told(problem, cells, len(grid.cells)) for problem, cells in problems.items()]
        )
    runs = []
    for cell, parsed in zip(grid.cells, configs, strict=True):
        config, data = flat_values(parsed), data_digest(parsed.data)
        for seed in grid.file.seeds:
            own = {**config, "seed_everything": seed}
            runs.append(
                GridRun(
                    cell=cell,
                    seed=seed,
                    identity=identity_of(own, data),
                    words=tuple(words_of(files, cell, seed, machine)),
                    config=own,
                    parsed=parsed,
                )
            )
    return runs


def _parsed(words: Sequence[list[str]]) -> Iterator[Any]:
    reader = RunConfigs()
    for own in tqdm(words, desc="cells", disable=len(words) < 20, leave=False):
        try:
            yield reader.read(own)
        except ConfigurationError as error:
            yield error


def _told(problem: str, cells: list[str], num_cells: int) -> str:
    if len(cells) == num_cells:
        return f"every cell: {problem}"
    shown = ", ".join(cells[:3]) + (f" and {len(cells) - 3} more" if len(cells) > 3 else "")
    return f"{shown}: {problem}"


def idle_axes(grid: Grid, runs: Sequence[GridRun]) -> list[str]:
    """Axes whose levels change nothing in any run, whatever the other axes are.

    Args:
        grid: The grid.
        runs: Of ``resolve``.
    """
    by_levels = {(tuple(run.cell.levels.items()), run.seed): run.identity for run in runs}
    idle = []
    for axis, levels in grid.axes.items():
        groups: dict[Any, set[str]] = {}
        for (own, seed), identity in by_levels.items():
            rest = tuple((name, label) for name, label in own if name != axis)
            groups.setdefault((rest, seed), set()).add(identity)
        if len(levels) > 1 and all(len(identities) == 1 for identities in groups.values()):
            idle.append(axis)
    return idle
