"""A few hundred conversations -> rows that fit, with everything that was lost counted.

Works in any process: what it is given and what it returns are plain arrays and tuples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.example import EncodedExample
from qlora_pl.data.encoding.lengths import Limits, Overlong, source_length
from qlora_pl.data.reading.places import Place
from qlora_pl.data.rows.audit import SHOWN, DataReport
from qlora_pl.data.rows.row_store import EncodedChunk
from qlora_pl.errors import ConfigurationError, DatasetFormatError

Read = tuple[Place, Conversation, int]
"""A conversation, its place, and the number of its source."""


def trained_rows(fitted: Sequence[EncodedExample], overlong: Overlong) -> list[EncodedExample]:
    """Those of the rows that are left of an example of which something of an answer is trained.

    Pieces of a row that was split may hold nothing but a trained question: nothing is lost there.
    """
    return [row for row in fitted if overlong == "split" or row.is_worth_training]


class ChunkResult(NamedTuple):
    """What became of a chunk of conversations."""

    chunk: EncodedChunk
    report: DataReport
    needed: np.ndarray
    """How many trained tokens need each ``max_length`` to be kept."""


class ChunkEncoder:
    """Encodes conversations and fits them to a length; works in any process.

    Args:
        encoder: Renders and tokenises.
        limits: How long rows may be.
        skips: Whether a conversation that the template refuses is counted instead of an error.
    """

    def __init__(self, encoder: Encoder, limits: Limits, skips: bool = False) -> None:
        self.encoder = encoder
        self.limits = limits
        self.skips = skips

    def __call__(self, chunk: Sequence[Read], origin_numbers: Sequence[int]) -> ChunkResult:
        """Encode, fit and count.

        Raises:
            ConfigurationError, DatasetFormatError: naming the first row that cannot be encoded.
        """
        report = DataReport()
        kept: list[EncodedExample] = []
        origins: list[tuple[int, int, int, int]] = []
        conversations: list[Conversation] = []
        needed: list[np.ndarray] = []
        encoded = self._encode(chunk, report)
        for (place, conversation, _), origin, examples in zip(
            chunk, origin_numbers, encoded, strict=True
        ):
            rows = []
            for example in examples:
                if example.is_worth_training:  # no length would keep another
                    needed.append(self.encoder.needed(example, self.limits))
                rows += self._fit(example, place, report)
            report.num_unrolled += len(examples) > 1
            if rows:
                has_parts = len(rows) > 1
                origins += [
                    (origin, place.row, part if has_parts else 0, len(conversations))
                    for part in range(1, len(rows) + 1)
                ]
                kept += rows
                conversations.append(conversation)
        report.num_rows = len(kept)
        return ChunkResult(
            EncodedChunk.of(kept, origins, conversations),
            report,
            np.bincount(np.concatenate(needed)) if needed else np.zeros(0, np.int64),
        )

    def _encode(self, chunk: Sequence[Read], report: DataReport) -> list[list[EncodedExample]]:
        try:
            return self.encoder.encode([conversation for _, conversation, _ in chunk])
        except ConfigurationError:
            pass
        encoded: list[list[EncodedExample]] = []
        for place, conversation, _ in chunk:  # once more, one by one, to name the row
            try:
                encoded += self.encoder.encode([conversation])
            except ConfigurationError as error:
                if not self.skips:
                    raise ConfigurationError(f"{place}: {error}") from error
                encoded.append([])
                report.num_skipped += 1
                report.skipped = [*report.skipped, f"{place}: {error}"][:SHOWN]
        return encoded

    def _fit(
        self, example: EncodedExample, place: Place, report: DataReport
    ) -> list[EncodedExample]:
        """The rows that are kept of an example, counted."""
        overlong = self.limits.overlong
        length = len(example.input_ids)
        source = source_length(example) if self.encoder.is_paired else length
        report.longest = max(report.longest, source)
        report.longest_target = max(report.longest_target, length - source)
        report.num_spelling_control += example.spells_control
        if not example.is_worth_training:
            report.num_dropped += 1
            report.num_untrained += 1
            report.untrained = [*report.untrained, str(place)][:SHOWN]
            return []
        fitted = self.encoder.fit(example, self.limits)
        is_long = len(fitted) != 1 or len(fitted[0].input_ids) != length
        if is_long and overlong == "error":
            raise DatasetFormatError(
                f"{place}: {length} tokens, more than {self.limits}. Raise it, or "
                "set data.overlong: cut or drop."
            )
        rows = trained_rows(fitted, overlong)
        num_trained = sum(row.num_trained for row in rows)
        report.num_lost_tokens += example.num_trained - num_trained
        report.num_trained_tokens += num_trained
        report.num_tokens += sum(len(row.input_ids) for row in rows)
        if not rows:
            report.num_dropped += 1
            return []
        is_split = is_long and overlong == "split"
        report.num_split += is_split
        report.num_cut += is_long and not is_split
        # A cut row loses its stop token, which is counted; a whole one without never teaches it.
        report.num_unstopped += 0 if is_long and overlong == "cut" else example.num_unstopped
        report.num_straddling += example.num_straddling
        report.num_trimmed += example.num_trimmed
        return rows
