"""Where a row came from, and what stands in for a row that could not be read.

Readers hand on a ``BadRow`` instead of raising, since the rows after it may be good: whether a run
stops there or goes on without it is decided in one place, ``normalizing``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""One record as it is stored: column -> value."""


class Place(NamedTuple):
    """Where a row came from; ``row`` counts from 1, as editors do."""

    source: str
    row: int
    part: int = 0
    """Counts from 1 where a row became several."""

    def __str__(self) -> str:
        part = f", part {self.part}" if self.part else ""
        return f"{self.source}, row {self.row}{part}"


class BadRow(NamedTuple):
    """A record that is no row, between two that may be good."""

    reason: str
    """What is wrong and what to do, one sentence without the place: "not JSON (...); ..."."""


PlacedRow = tuple[Place, Row | BadRow]
