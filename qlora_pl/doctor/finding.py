"""What a check found, and what it means: one line of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a finding bears on training."""

    OK = "ok"
    """It works, and was tried where it can be."""
    NOTE = "note"
    """Worth knowing: something is absent that not every run needs."""
    WARNING = "warning"
    """Runs start, and some of them will be slow, or fail, or differ."""
    BROKEN = "broken"
    """Runs do not start, or train on something else than they should."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found.

    Attributes:
        title: What was looked at.
        status: How it bears on training.
        found: What there is, with its numbers.
        meaning: What that means for training, in one clause.
        fix: A command, where there is one; "" otherwise.
    """

    title: str
    status: Status
    found: str
    meaning: str
    fix: str = ""

    def to_plain(self) -> dict[str, Any]:
        """The finding in plain types, for JSON and for the way between processes."""
        return {key: str(value) for key, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, plain: dict[str, str]) -> Finding:
        """The finding of ``to_plain``."""
        return cls(**{**plain, "status": Status(plain["status"])})  # type: ignore[arg-type]


Trial = Callable[[], Iterator["Finding | str"]]
"""A check: yields what it found, and before that, as text, what it is about to try."""


def first_line(error: BaseException) -> str:
    """An error as its kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def could_not_look(title: str, error: BaseException, fix: str = "") -> Finding:
    """The finding of a check that failed itself."""
    return Finding(
        title=title,
        status=Status.BROKEN,
        found=first_line(error),
        meaning="the check itself failed here, and a run that needs the same would fail too",
        fix=fix,
    )
