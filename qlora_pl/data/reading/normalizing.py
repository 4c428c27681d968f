"""Sources -> conversations, each with its place; what becomes of bad rows is decided here.

A bad row stops the run, or is left out and counted (``on_error: skip``) as long as such rows are
few: a wrong format would otherwise leave out nearly everything and train on the rest.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, NamedTuple

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.reading.cells import RowError
from qlora_pl.data.reading.formats import FORMATS, guess_format, marked_format
from qlora_pl.data.reading.named_datasets import TREES
from qlora_pl.data.reading.places import BadRow, Place, PlacedRow, Row
from qlora_pl.data.reading.readers import RawRows, rows_in_memory, take
from qlora_pl.data.reading.row_files import MAX_ROW_BYTES
from qlora_pl.data.reading.source_config import SourceConfig
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.errors import ConfigurationError, DatasetFormatError

logger = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]
MAX_SKIPPED_RATIO = 0.01
"""Share of a source's rows that may be bad."""
MIN_SKIPPED_ROWS = 10
"""Fewer bad rows than these are never too many, whatever their share."""
PROMPT_COLUMNS = ("system", "system_prompt", "history", "tools")
"""Columns that hold a part of the prompt, and that no format here reads."""
NUM_LISTED = 20
"""Bad rows that a report names."""


class SkippedRow(NamedTuple):
    """A row that was left out, and why."""

    place: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class ReadingReport:
    """What was read; keys are sources as the user named them."""

    formats: dict[str, str] = field(default_factory=dict)
    """Format used for each source, with the runner-up where it was guessed."""
    num_rows: Counter[str] = field(default_factory=Counter)
    """Conversations that each source gave."""
    num_skipped: Counter[str] = field(default_factory=Counter)
    """Bad rows of each source that were left out."""
    skipped: list[SkippedRow] = field(default_factory=list)
    """The first ``NUM_LISTED`` of them, in order."""
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    """Messages of trees that are in no conversation, by source and reason."""

    def __str__(self) -> str:
        parts = []
        for source, format in self.formats.items():
            text = f"{source}: {self.num_rows[source]:,} rows, format {format}"
            if count := self.num_skipped[source]:
                text += f", {count:,} bad rows skipped"
            for reason, number in self.left_out.get(source, Counter()).most_common():
                text += f"; left out: {number:,} ({reason})"
            parts.append(text)
        return "\n".join([*parts, *(f"skipped {row}" for row in self.skipped)])


def read_conversations(
    sources: RowSources,
    on_error: OnError = "stop",
    report: ReadingReport | None = None,
    max_skipped_ratio: float = MAX_SKIPPED_RATIO,
) -> Iterator[tuple[Place, Conversation]]:
    """Every row as a conversation with its place, in the order of the sources.

    Args:
        sources: Where the rows come from.
        on_error: ``stop``: a bad row raises; ``skip``: it is left out and counted.
        report: Filled in while the rows are drawn.
        max_skipped_ratio: Share of a source's rows that may be skipped, if they are
            ``MIN_SKIPPED_ROWS`` or more; in [0, 1].

    Raises:
        DatasetFormatError: naming the first bad row (``stop``) or the share of them (``skip``), or
            a file that cannot be read.
    """
    report = ReadingReport() if report is None else report
    if sources.rows is not None:
        name = "rows in memory"
        yield from _Reading(name, None, on_error, report, max_skipped_ratio).conversations(
            rows_in_memory(sources.rows)
        )
    for source in sources.sources:
        reading = _Reading(source.name, source, on_error, report, max_skipped_ratio)
        yield from reading.conversations(reading.rows_of_format(source))


class _Reading:
    """One source being read."""

    def __init__(
        self,
        name: str,
        source: SourceConfig | None,
        on_error: OnError,
        report: ReadingReport,
        max_skipped_ratio: float,
    ) -> None:
        self.name, self.on_error, self.report = name, on_error, report
        self.max_skipped_ratio = max_skipped_ratio
        self.format = source.resolved().format if source is not None else None
        self.num_rows = self.num_skipped = 0
        self._formats: dict[str, str] = {}  # those guessed, by file
        self._unguessable = ""
        self._first_skipped: SkippedRow | None = None

    def rows_of_format(self, source: SourceConfig) -> Iterator[PlacedRow]:
        """The rows of the source; those of a format that is not one row a conversation, made so."""
        raw = RawRows(source)
        rows = iter(raw)
        opening: list[PlacedRow] = []  # up to the first good row, which tells the format
        name = self.format
        for place, row in rows:
            opening.append((place, row))
            if not isinstance(row, BadRow):
                name = name or self._guess(place, row)
                break
        self._refuse_idle(source, name)
        whole: Iterator[PlacedRow] = chain(opening, rows)
        if name is not None and (regroup := FORMATS[name].regroup):
            self.format = name  # of all files, since a conversation may lie in several
            left_out = self.report.left_out.setdefault(self.name, Counter())
            whole = regroup(whole, source.tree_rules, left_out)
        yield from take(whole, source)
        raw.check_renames()

    def _refuse_idle(self, source: SourceConfig, name: str | None) -> None:
        """Settings of message trees, once the format is known to be another."""
        if name not in (None, *TREES) and (source.languages or source.replies != "best"):
            raise ConfigurationError(
                f"data.sources ({self.name}): languages and replies are for message trees, and "
                f"format is {name}; remove them."
            )

    def conversations(self, rows: Iterator[PlacedRow]) -> Iterator[tuple[Place, Conversation]]:
        """Converted, checked and counted."""
        for place, row in rows:
            found = row if isinstance(row, BadRow) else self._convert(place, row)
            if isinstance(found, BadRow):
                self._pass_over(place, found.reason)
            else:
                self.num_rows += 1
                self.report.num_rows[self.name] += 1
                yield place, found
        self._refuse_many()

    def _convert(self, place: Place, row: Row) -> Conversation | BadRow:
        name = self.format or self._guess(place, row)
        if name is None:
            return BadRow(self._unguessable)
        if not self._formats:
            self._note(name)
        if FORMATS[name].regroup and self.format is None:  # a later file of a folder
            return BadRow(
                f"rows of format '{name}' are not read among those of others; name the file as a "
                "source of its own."
            )
        try:
            conversation = FORMATS[name].convert(row)
        except RowError as error:
            return BadRow(f"{error}. {error.remedy} (format '{name}').")
        if problem := conversation.problem():
            return BadRow(f"{problem}. Mend or remove the row.")
        if sum(len(message.content) for message in conversation.messages) > MAX_ROW_BYTES:
            return BadRow(f"it is longer than {MAX_ROW_BYTES:,} characters; split it.")
        return conversation

    def _guess(self, place: Place, row: Row) -> str | None:
        """By file, since a folder may hold several kinds; None: no format fits this row."""
        if place.source not in self._formats:
            try:
                name, runner_up = guess_format(list(row))
            except ConfigurationError as error:
                self._unguessable = str(error)
                return None
            also = f"; {runner_up} would fit too" if runner_up else ""
            if name == "text" and (marked := marked_format(str(row.get("text")))):
                also = f"; its first row has the turns of {marked}"
            self._formats[place.source] = name
            self._note(f"{name} (guessed{also})")
            for column in PROMPT_COLUMNS:
                if row.get(column):
                    logger.warning(
                        "%s: column '%s' is not used by format %s; if it matters, make it part of "
                        "messages",
                        self.name,
                        column,
                        name,
                    )
        return self._formats[place.source]

    def _note(self, said: str) -> None:
        known = self.report.formats.get(self.name)
        if known is None:
            self.report.formats[self.name] = said
        elif f"; {said}; " not in f"; {known}; ":
            self.report.formats[self.name] = f"{known}; {said}"
        else:
            return
        if "guessed" in said:
            logger.info("%s: format %s", self.name, said)

    # -- bad rows --------------------------------------------------------------------------------

    def _pass_over(self, place: Place, reason: str) -> None:
        skipped = SkippedRow(place, reason)
        if self.on_error == "stop":
            raise DatasetFormatError(str(skipped))
        self.num_skipped += 1
        self.report.num_skipped[self.name] += 1
        self._first_skipped = self._first_skipped or skipped
        if len(self.report.skipped) < NUM_LISTED:
            self.report.skipped.append(skipped)

    def _refuse_many(self) -> None:
        """At the source's end, so that it does not matter where in it the bad rows stand."""
        total = self.num_rows + self.num_skipped
        is_many = self.num_skipped > self.max_skipped_ratio * total
        if not self.num_skipped or (
            self.num_rows and not (is_many and self.num_skipped >= MIN_SKIPPED_ROWS)
        ):
            return
        raise DatasetFormatError(
            f"{self.name}: {self.num_skipped:,} of {total:,} rows are bad, and at most "
            f"{self.max_skipped_ratio:.1%} may be left out; mend them, or set another format. The "
            f"first: {self._first_skipped}"
        )
