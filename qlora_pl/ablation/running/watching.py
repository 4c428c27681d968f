"""What a person sees of a grid that goes on: a table repainted, or a line for each change."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

from qlora_pl.ablation.running.grid_folder import GridEntry, GridFolder
from qlora_pl.ablation.running.store import RunState
from qlora_pl.ablation.running.task import Task


def status_lines(
    folder: GridFolder, entries: Sequence[GridEntry], metric: str, width: int = 100
) -> list[str]:
    """One line for each run: what has become of it, how long it took, what it came to.

    Args:
        folder: Of the grid.
        entries: Its runs.
        metric: Whose value is shown.
        width: Columns of a line.
    """
    names = max((len(entry.name) for entry in entries), default=4)
    lines = [f"{'run':{names}}  {'state':13}  {'minutes':>7}  {metric}"]
    for entry in entries:
        home = folder.home(entry)
        state = home.state()
        lines.append(
            f"{entry.name:{names}}  {state.kind:13}  {state.seconds / 60:7.1f}  "
            f"{_value(folder, entry, state, metric)}"[:width].rstrip()
        )
    counts = Counter(folder.home(entry).state().kind for entry in entries)
    told = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    return [*lines, f"{len(entries)} runs: {told}"]


def _value(folder: GridFolder, entry: GridEntry, state: RunState, metric: str) -> str:
    if state.kind != "finished":
        return state.why or ""
    value = folder.home(entry).result().metrics.get(metric)
    return f"{value:.6g}" if isinstance(value, int | float) else f"no {metric} was logged"


class Watcher:
    """Tells what changes: called by an executor for each run that starts and ends.

    Args:
        folder: Of the grid.
        entries: All of its runs, those that are not started now as well.
        metric: Whose value is shown.
        stream: Standard error, usually.
    """

    def __init__(
        self,
        folder: GridFolder,
        entries: Sequence[GridEntry],
        metric: str,
        stream: TextIO | None = None,
    ) -> None:
        self._folder, self._entries, self._metric = folder, entries, metric
        self._stream = stream or sys.stderr
        self._painted = 0
        self._began = time.monotonic()
        self.errors: list[BaseException] = []

    def __call__(self, task: Task, state: RunState | None, error: BaseException | None) -> None:
        """Report one run."""
        if error is not None:
            self.errors.append(error)
        if self._stream.isatty():
            self.repaint()
        else:
            said = "started" if state is None and error is None else self._end_of(state, error)
            minutes = (time.monotonic() - self._began) / 60
            print(f"{minutes:7.1f} min  {task.name}: {said}", file=self._stream, flush=True)

    def repaint(self) -> None:
        """The whole table, over the one before."""
        lines = status_lines(self._folder, self._entries, self._metric)
        up = f"\x1b[{self._painted}F\x1b[J" if self._painted else ""
        print(up + "\n".join(lines), file=self._stream, flush=True)
        self._painted = len(lines)

    def _end_of(self, state: RunState | None, error: BaseException | None) -> str:
        if state is None:
            return f"{type(error).__name__}: {error}"
        why = f" ({state.why})" if state.why else ""
        return f"{state.kind}{why}, {state.seconds / 60:.1f} min"
