"""``GridFolder``: what a grid is made of, written down once, and read by status and report.

ROOT/NAME/
  grid.yaml     the grid file as it was
  runs.json     every run: its cell, seed, identity, command and configuration
  report.html   and its other forms
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_pl.ablation.running.store import RunHome
from qlora_pl.ablation.running.task import Task
from qlora_pl.errors import AblationError
from qlora_pl.files import write_atomic, write_json


@dataclass(frozen=True, kw_only=True)
class GridEntry:
    """One run of a grid, as it is written down."""

    cell: str
    seed: int
    identity: str
    levels: dict[str, str]
    """Axis -> label."""
    words: tuple[str, ...]
    """For ``qlora-pl fit``."""
    changes: dict[str, Any]
    """Key -> value, where the cell is not as its base."""

    @property
    def name(self) -> str:
        """The cell's, with the seed."""
        return f"{self.cell}-seed{self.seed}"


class GridFolder:
    """The folder of one grid.

    Args:
        root: Of all grids.
        name: The grid file's, without its suffix.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.path = root, root / name

    def write(self, text: str, entries: Sequence[GridEntry], about: dict[str, Any]) -> None:
        """Write down what the grid is made of.

        Args:
            text: The grid file's.
            entries: All runs, in their order.
            about: What the report says of the grid as a whole.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "grid.yaml", text)
        runs = [vars(entry) | {"words": list(entry.words)} for entry in entries]
        plain = {"grid": sha256(text.encode()).hexdigest(), **about, "runs": runs}
        write_json(self.path / "runs.json", plain)

    def is_of(self, text: str) -> bool:
        """Whether what is written down is of this grid file's very text."""
        try:
            return bool(self.read()["grid"] == sha256(text.encode()).hexdigest())
        except AblationError:
            return False

    def read(self) -> dict[str, Any]:
        """What was written down.

        Raises:
            AblationError: if nothing was, or a file was cut.
        """
        path = self.path / "runs.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            found["entries"] = [
                GridEntry(**{**run, "words": tuple(run["words"])}) for run in found.pop("runs")
            ]
        except OSError as error:
            raise AblationError(
                f"'{path}' could not be read ({error.strerror}); start the grid with --run first."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise AblationError(
                f"'{path}' was cut or changed ({error}); --run writes it anew, and keeps all runs."
            ) from error
        return found

    def home(self, entry: GridEntry) -> RunHome:
        """Where a run lives."""
        return RunHome(self.root, entry.identity)

    def task(self, entry: GridEntry, directory: Path, num_gpus: int) -> Task:
        """A run as executors take it.

        Args:
            entry: The run.
            directory: Where relative paths begin.
            num_gpus: That it trains on.
        """
        return Task(
            name=entry.name,
            root=str(self.root.resolve()),
            identity=entry.identity,
            words=entry.words,
            description={"levels": entry.levels, "changes": entry.changes},
            directory=str(directory),
            num_gpus=num_gpus,
        )
