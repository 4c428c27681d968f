"""``RunStore``: one home for each run that any grid ever asked for, under what the run really is.

    ROOT/runs/IDENTITY/
      run.json        what it is called, the command, the whole configuration
      state.json      what has become of it
      log.txt         what its processes printed, one after another
      fit/version_N/  the run folder of ``fit``: checkpoints, metrics, adapter

Two grids that share a run share its home, and a grid that grows finds what it had.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qlora_pl.errors import AblationError
from qlora_pl.files import write_json

Kind = Literal["waiting", "running", "stopped", "finished", "failed", "out of memory", "not finite"]
ENDED_BADLY: tuple[Kind, ...] = ("failed", "out of memory", "not finite")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What has become of a run."""

    kind: Kind = "waiting"
    """``stopped``: it was ended from outside and goes on from its checkpoint."""
    attempts: int = 0
    """Processes that were started for it."""
    codes: tuple[str, ...] = ()
    """``identity.code_version`` of each, without repeats."""
    seconds: float = 0.0
    """Of all attempts together, imports and loading included."""
    why: str | None = None
    """The last line that a failed process printed, or how it was ended."""
    where: str | None = None
    """Machine of the last attempt."""

    def next_attempt(self, code: str, where: str) -> RunState:
        """The state while a further process runs."""
        codes = self.codes if code in self.codes else (*self.codes, code)
        return replace(
            self, kind="running", attempts=self.attempts + 1, codes=codes, why=None, where=where
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run came to."""

    metrics: Mapping[str, Any]
    """Of its metrics.json."""
    curves: tuple[Mapping[str, str], ...] = field(default=())
    """Rows of its metrics.csv."""


class RunHome:
    """The folder of one run.

    Args:
        root: Of all grids.
        identity: See ``grid.identity``.
    """

    def __init__(self, root: Path, identity: str) -> None:
        self.path = root / "runs" / identity

    @staticmethod
    def stop_file(root: str | Path) -> Path:
        """A file that asks every run under a root, on whichever machine, to save and end."""
        return Path(root) / "stop"

    @property
    def log(self) -> Path:
        """What its processes printed."""
        return self.path / "log.txt"

    @property
    def folder(self) -> Path:
        """The folder that ``fit`` writes; a run that failed before it saved begins another."""
        found = [path for path in (self.path / "fit").glob("version_*") if path.name[8:].isdigit()]
        number = max((int(path.name[8:]) for path in found), default=0)
        return self.path / "fit" / f"version_{number}"

    def state(self) -> RunState:
        """What has become of it.

        Raises:
            AblationError: if the file is there and is none of ours.
        """
        path = self.path / "state.json"
        try:
            found = json.loads(path.read_text("utf-8"))
            return RunState(**{**found, "codes": tuple(found["codes"])})
        except FileNotFoundError:
            return RunState()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise AblationError(
                f"'{path}' is not the state of a run ({error}); remove that file, and the run goes "
                "on from its last checkpoint."
            ) from error

    def note(self, state: RunState) -> None:
        """Write down what has become of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "state.json", asdict(state))

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write down what it is, unless that is there already."""
        path = self.path / "run.json"
        if not path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(path, dict(description))

    def is_complete(self) -> bool:
        """Whether ``fit`` itself says that the run reached its end."""
        try:
            return self._metrics().get("is_complete") is True
        except AblationError:
            return False

    def result(self) -> Result:
        """What the finished run came to.

        Raises:
            AblationError: if a file of it was cut or is gone.
        """
        path = self.folder / "metrics.csv"
        try:
            with path.open(newline="") as file:
                curves = tuple(csv.DictReader(file))
        except OSError as error:
            raise AblationError(f"'{path}' could not be read ({error.strerror}).") from error
        return Result(metrics=self._metrics(), curves=curves)

    def _metrics(self) -> dict[str, Any]:
        path = self.folder / "metrics.json"
        try:
            found = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise AblationError(f"'{path}' could not be read ({error.strerror}).") from error
        except ValueError as error:
            raise AblationError(
                f"'{path}' was cut or changed; remove the run's folder "
                f"'{self.path}', and it is trained again."
            ) from error
        if not isinstance(found, dict):
            raise AblationError(f"'{path}' holds no metrics.")
        return found
