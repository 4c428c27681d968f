"""``qlora-pl ablate``: a grid of runs, from its question to its report."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_pl.ablation.grid.cells import Grid, make_grid
from qlora_pl.ablation.grid.grid_file import read_grid
from qlora_pl.ablation.running.folder_lock import FolderLock
from qlora_pl.ablation.running.grid_folder import GridEntry, GridFolder
from qlora_pl.ablation.running.local import Executor, LocalExecutor, slots
from qlora_pl.ablation.running.store import ENDED_BADLY
from qlora_pl.ablation.running.watching import Watcher, status_lines
from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.inference.flags import Flags

if TYPE_CHECKING:
    from qlora_pl.ablation.grid.resolving import GridRun

DESCRIPTION = """Train a grid of runs and say what differs. Without --run, --status or --report:
list the cells and what they would cost (--plan). Nothing that is finished is trained again."""


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """Flags of the command."""

    config: str | None = None
    """The grid file; see docs/ablations.md."""
    plan: bool = False
    """List cells, memory and time; start nothing."""
    run: bool = False
    """Train what is not finished, and go on with what was stopped; ends with the report."""
    status: bool = False
    """Say what has become of each run."""
    report: bool = False
    """Write the report from the results there are."""
    retry_failed: bool = False
    """With --run: try those again that ended badly."""
    only: tuple[str, ...] = ()
    """A cell, or a run, by its name; may be given several times."""
    root: str = "runs/ablations"
    """The folder of all grids; what is equal in two of them is trained once."""
    machine: str | None = None
    """A file for --trainer of every run: devices, strategy."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """What starts the runs."""
    jobs: int | None = None
    """Runs at once; None: one for each GPU of a run, on CPUs one."""
    ray_address: str | None = None
    """With --executor ray: a cluster's head; None: a cluster is started here."""
    slurm: tuple[str, ...] = ()
    """With --executor slurm: KEY=VALUE for sbatch, such as partition=gpu or time=600 (minutes)."""
    gpu: str | None = None
    """With --plan: a card, or its memory, as `qlora-pl plan` takes it."""
    json: bool = False
    """With --plan: JSON in place of a table."""

    def __post_init__(self) -> None:
        problems = []
        if self.config is None:
            problems.append("ablate: name a grid file with --config.")
        modes = [name for name in ("plan", "run", "status", "report") if getattr(self, name)]
        if len(modes) > 1:
            problems.append(f"ablate: --{modes[0]} and --{modes[1]} are two tasks; give one.")
        if self.retry_failed and not self.run:
            problems.append("--retry-failed: has a meaning with --run alone.")
        if self.jobs is not None and self.jobs < 1:
            problems.append(f"--jobs: must be at least 1, got {self.jobs}.")
        if problems:
            raise ConfigurationError(problems)


def flags() -> Flags:
    """The command's flags."""
    parser = Flags("ablate", DESCRIPTION)
    parser.add_settings(AblateOptions, "the grid")
    return parser


def ablate_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``ablate``.

    Returns:
        The exit code: 1 if a run that was to be trained is not finished.

    Raises:
        QLoRAError: for mistakes in words and files, and results that cannot be read.
    """
    parser = flags()
    options = AblateOptions(**parser.settings(AblateOptions, parser.parse(words)))
    if options.run or options.report:
        _refuse_without_statistics()
    path = Path(str(options.config)).expanduser()
    grid = make_grid(read_grid(path))
    folder = GridFolder(Path(options.root).expanduser(), path.stem)
    text = path.read_text("utf-8")
    if options.status or options.report:
        found = folder.read()
        if not folder.is_of(text):
            print(
                f"'{path}' has changed since it was run; this is about the grid as it was.",
                file=sys.stderr,
            )
        entries = _only(found["entries"], options.only)
    else:
        runs = _resolved(grid, path, options)
        entries = _only([_entry(run) for run in runs], options.only)
        if not options.run:
            print(_planned(grid, runs, entries, options))
            return 0
        _write_down(grid, folder, text, [_entry(run) for run in runs])
    if options.run:
        return _run(grid, folder, entries, options, _gpus_of(runs))
    if options.report:
        print(_reported(grid, folder, entries))
    else:
        print("\n".join(status_lines(folder, entries, grid.file.metric.name)))
    return 0


def _refuse_without_statistics() -> None:
    """Before anything is trained whose report could not be written.

    Raises:
        ConfigurationError: if the extra is not installed.
    """
    if missing := [name for name in ("scipy", "statsmodels") if find_spec(name) is None]:
        raise ConfigurationError(
            f'ablate: a report needs {missing[0]}: pip install "qlora-pl[ablation]".'
        )


def _resolved(grid: Grid, path: Path, options: AblateOptions) -> list[GridRun]:
    from qlora_pl.ablation.grid.resolving import idle_axes, resolve  # the parser takes seconds

    named = [grid.file.base] if isinstance(grid.file.base, str) else list(grid.file.base)
    files = [Path(os.path.normpath(path.parent / name)) for name in named]
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigurationError(f"base: no file '{missing[0]}'.")
    machine = None if options.machine is None else Path(options.machine)
    runs = resolve(grid, files, machine)
    budget = grid.file.budget.runs
    if budget is not None and len(runs) > budget:
        raise ConfigurationError(f"budget.runs: the grid has {len(runs)} runs, not {budget}.")
    for axis in idle_axes(grid, runs):
        print(f"axes.{axis}: changes nothing in any run.", file=sys.stderr)
    return runs


def _entry(run: GridRun) -> GridEntry:
    return GridEntry(
        cell=run.cell.name,
        seed=run.seed,
        identity=run.identity,
        levels=dict(run.cell.levels),
        words=run.words,
        changes=dict(run.cell.settings),
    )


def _write_down(grid: Grid, folder: GridFolder, text: str, entries: Sequence[GridEntry]) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder.path) as lock:
        _refuse_second(folder, lock)
        folder.write(text, entries, {"question": grid.file.question})


def _refuse_second(folder: GridFolder, lock: FolderLock) -> None:
    if not lock.is_held:
        raise ConfigurationError(
            f"'{folder.path}' is being run by another process; wait until it ends."
        )


def _only(entries: list[GridEntry], names: Sequence[str]) -> list[GridEntry]:
    known = {name for entry in entries for name in (entry.cell, entry.name)}
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"--only: no cell is called '{name}'{did_you_mean(name, known)}"
            )
    return [entry for entry in entries if not names or {entry.cell, entry.name} & set(names)]


def _planned(
    grid: Grid, runs: Sequence[GridRun], entries: Sequence[GridEntry], options: AblateOptions
) -> str:
    from qlora_pl.ablation.grid.costs import costs_of, costs_text
    from qlora_pl.planning.work.cards import card_named

    card = None if options.gpu is None else card_named(options.gpu)
    names = {entry.name for entry in entries}
    costs = costs_of([run for run in runs if run.name in names], card)
    budget = grid.file.budget.hours
    hours = sum(one.device_hours or 0.0 for one in costs)
    if budget is not None and hours > budget:
        raise ConfigurationError(
            f"budget.hours: the grid is planned to take {hours:.1f} device hours on {options.gpu}, "
            f"not {budget:g}."
        )
    if options.json:
        plain = {"cells": [vars(one) for one in costs], "runs": [vars(entry) for entry in entries]}
        return json.dumps(plain, indent=1)
    commands = [f"{entry.name}:\n  qlora-pl fit {shlex.join(entry.words)}" for entry in entries]
    table = costs_text(costs, card, len(grid.file.seeds))
    return "\n".join([grid.file.question, "", *commands, "", table])


def _reported(grid: Grid, folder: GridFolder, entries: Sequence[GridEntry]) -> Path:
    from qlora_pl.ablation.report.numbers import numbers_of  # scipy
    from qlora_pl.ablation.report.page import write_report

    return write_report(numbers_of(grid, folder, entries), folder.path)


def _gpus_of(runs: Sequence[GridRun]) -> int:
    from qlora_pl.strategies.fitting import num_gpus

    return max(num_gpus(run.parsed.trainer) for run in runs)


def _run(
    grid: Grid,
    folder: GridFolder,
    entries: Sequence[GridEntry],
    options: AblateOptions,
    num_gpus: int,
) -> int:
    watcher = Watcher(folder, entries, grid.file.metric.name)
    wanted = [
        entry
        for entry in entries
        if options.retry_failed or folder.home(entry).state().kind not in ENDED_BADLY
    ]
    stopping = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in STOPS}
    try:
        with FolderLock(folder.path) as lock:
            _refuse_second(folder, lock)
            tasks = [folder.task(entry, Path.cwd(), num_gpus) for entry in wanted]
            if tasks:
                executor_of(options, folder, num_gpus).run(tasks, watcher, stopping)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for error in watcher.errors:
        raise error
    print("\n".join(status_lines(folder, entries, grid.file.metric.name)))
    if not stopping.is_set():
        print(_reported(grid, folder, entries))
    states = [folder.home(entry).state().kind for entry in entries]
    return int(any(kind != "finished" for kind in states))


def executor_of(options: AblateOptions, folder: GridFolder, num_gpus: int) -> Executor:
    """What starts the runs.

    Args:
        options: The command's.
        folder: Of the grid.
        num_gpus: Of each run; 0: it trains on CPUs.

    Raises:
        ConfigurationError: if it is not installed, or not to be reached.
    """
    if options.executor == "ray":
        from qlora_pl.ablation.running.ray_cluster import RayExecutor

        return RayExecutor(options.ray_address, options.jobs or 1)
    if options.executor == "slurm":
        from qlora_pl.ablation.running.slurm_array import SlurmExecutor, sbatch_settings

        settings = sbatch_settings(options.slurm)
        return SlurmExecutor(folder.path / "slurm", options.jobs, settings=settings)
    gpus = visible_gpus() if num_gpus else []
    return LocalExecutor(slots(gpus, num_gpus, options.jobs))


def visible_gpus() -> list[str]:
    """This process's GPUs, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch  # slow to import

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


STOPS = (signal.SIGINT, signal.SIGTERM)
"""Signals after which runs save and end, and the command with them."""
