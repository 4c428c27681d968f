"""What became of the rows of a split, and whether they are worth training on.

Every row is looked at before any weight is loaded. What is wrong with one row stops the run (file
and row are named); what happens to many is counted, reported and held to a budget.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.normalizing import ReadingReport
from qlora_pl.errors import ConfigurationError

SHOWN = 20
"""Rows of a kind that a report names; the others it counts."""


@dataclass
class DataReport:
    """What became of the rows of one split; logged at the start of a run."""

    formats: dict[str, str] = field(default_factory=dict)
    """Format used for each source, with the runner-up where it was guessed."""
    rows_by_source: dict[str, int] = field(default_factory=dict)
    """Rows that each source gave, before anything was dropped."""
    num_rows: int = 0
    num_skipped: int = 0
    """Rows that are not what their format says (with ``on_error: skip``)."""
    skipped: list[str] = field(default_factory=list)
    """The first of them, with the reason."""
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    """Messages of trees that are in no conversation, by source and reason."""
    num_unrolled: int = 0
    """Conversations of which every answer became a row of its own."""
    num_split: int = 0
    """Rows that were split into pieces."""
    num_dropped: int = 0
    """Rows left out: too long (with ``overlong: drop``) or with no token of an answer left."""
    num_untrained: int = 0
    """Those of them that have no trained token of an answer, whatever their length."""
    untrained: list[str] = field(default_factory=list)
    """The first of them."""
    num_cut: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_lost_tokens: int = 0
    """Trained tokens that did not fit into ``max_length``."""
    num_unstopped: int = 0
    """Trained answers of whole rows (not cut) without a stop token at their end."""
    num_straddling: int = 0
    """Tokens that cover the end of a prompt and the start of its answer at once."""
    num_trimmed: int = 0
    """Messages whose first or last spaces the template left out."""
    num_spelling_control: int = 0
    """Rows whose own text spells a control token, which was tokenised as ordinary text."""
    longest: int = 0
    """Tokens of the longest row, before cutting; of pairs, of the longest source."""
    longest_target: int = 0
    """Tokens of the longest target of pairs, before cutting; 0: rows are no pairs."""

    @property
    def lost_ratio(self) -> float:
        """Share of the trained tokens that ``max_length`` took away."""
        whole = self.num_trained_tokens + self.num_lost_tokens
        return self.num_lost_tokens / whole if whole else 0.0

    def add(self, other: DataReport) -> None:
        """Count what another part of the split counted."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name.startswith("longest"):
                setattr(self, item.name, max(mine, theirs))
            elif isinstance(mine, int):
                setattr(self, item.name, mine + theirs)
            elif isinstance(mine, list):
                setattr(self, item.name, [*mine, *theirs][:SHOWN])

    @property
    def longest_named(self) -> str:
        """How long the longest row is, or the longest source and target."""
        if not self.longest_target:
            return f"the longest row has {self.longest} tokens"
        return (
            f"the longest source has {self.longest} tokens and the longest target "
            f"{self.longest_target}"
        )

    def add_reading(self, reading: ReadingReport) -> None:
        """Count what was read, and what was no row."""
        self.formats = dict(reading.formats)
        self.rows_by_source = dict(reading.num_rows)
        self.num_skipped += sum(reading.num_skipped.values())
        self.skipped = [*(str(row) for row in reading.skipped), *self.skipped][:SHOWN]
        self.left_out = {source: dict(counts) for source, counts in reading.left_out.items()}

    def to_plain(self) -> dict[str, Any]:
        """In plain types, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"{self.num_rows:,} rows, {self.num_tokens:,} tokens, {self.num_trained_tokens:,} of "
            f"them trained; longest {'source' if self.longest_target else 'row'} {self.longest:,}"
        )
        if self.longest_target:
            text += f", longest target {self.longest_target:,}"
        if self.num_cut:
            text += f"; {self.num_cut:,} rows cut, {self.lost_ratio:.1%} of trained tokens lost"
        told = {
            "rows split": self.num_split,
            "rows dropped": self.num_dropped,
            "rows skipped": self.num_skipped,
            "conversations unrolled, a row for each answer": self.num_unrolled,
            "tokens straddle a prompt's end": self.num_straddling,
            "messages trimmed by the template": self.num_trimmed,
            "rows spell a control token, kept as text": self.num_spelling_control,
        }
        text += "".join(f"; {count:,} {what}" for what, count in told.items() if count)
        for source, counts in self.left_out.items():
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
            text += f"; {source}: messages left out: {reasons}" if reasons else ""
        if self.skipped:
            text += f"; skipped: {'; '.join(self.skipped)}"
        if self.untrained:
            more = self.num_untrained - len(self.untrained)
            text += f"; without a trained answer: {'; '.join(self.untrained)}"
            text += f" and {more:,} more" if more else ""
        return text


def check_split(
    report: DataReport, needed: np.ndarray, limits: Limits, key: str, template: str
) -> None:
    """Whether a split is worth training on.

    Args:
        report: What became of its rows.
        needed: How many trained tokens need each ``max_length`` to be kept.
        limits: What is allowed.
        key: The configuration key of the rows, for errors.
        template: The template's name, for errors.

    Raises:
        ConfigurationError: if nothing is left, more is lost than the budget allows, or an answer
            does not end in a stop token.
    """
    if report.num_rows == 0:
        reason = "there are no rows"
        if report.num_dropped:
            reason = (
                f"no answer fits into {limits.answer_key} {limits.answer_limit} "
                f"({report.longest_named})"
            )
        if report.untrained and report.num_untrained == report.num_dropped:
            reason = f"no answer has a weight above 0 (first: {report.untrained[0]})"
        raise ConfigurationError(f"{key}: nothing to train on, {reason}.")
    if report.lost_ratio > limits.max_lost_ratio:
        enough = sufficient_length(needed, limits.max_lost_ratio)
        raise ConfigurationError(
            f"{key}: {limits.answer_key} {limits.answer_limit} takes away "
            f"{report.lost_ratio:.1%} of the trained tokens, data.max_lost_ratio allows "
            f"{limits.max_lost_ratio:.1%}; {limits.answer_key} {enough} would keep within it "
            f"({report.longest_named})."
        )
    if report.num_unstopped:
        answers = "answer does" if report.num_unstopped == 1 else "answers do"
        raise ConfigurationError(
            f"{key}: {report.num_unstopped} {answers} not end in a trained stop token under the "
            f"template '{template}', so the model would not learn to stop; choose another "
            "data.template."
        )


def sufficient_length(needed: np.ndarray, max_lost_ratio: float) -> int:
    """The smallest ``max_length`` that loses no more than this share of the trained tokens."""
    lost = needed.sum() - np.cumsum(needed)  # of a limit of 0, 1, 2, ...
    return int(np.argmax(lost / needed.sum() <= max_lost_ratio))
