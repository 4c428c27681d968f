"""Raw rows -> encoded rows that are worth training on, or one sentence about why they are not.

Every row is looked at before any weight is loaded. What is wrong with one row stops the run (file
and row are named); what happens to many is counted, reported and held to a budget.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding import TOKENIZER_CHUNK, EncodedExample, EncodedRows, Encoder, Overlong
from qlora_pl.data.formats import FORMATS, RowError, guess_format
from qlora_pl.data.readers import Place, read_rows
from qlora_pl.data.sources import RowSources, SourceConfig
from qlora_pl.errors import ConfigurationError, DatasetFormatError

logger = logging.getLogger(__name__)


@dataclass
class DataReport:
    """What became of the rows of one split; logged at the start of a run."""

    formats: dict[str, str] = field(default_factory=dict)
    """Format used for each source, with the runner-up where it was guessed."""
    num_rows: int = 0
    num_dropped: int = 0
    """Rows left out: too long (with ``overlong: drop``) or with no token of an answer left."""
    num_cut: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_lost_tokens: int = 0
    """Trained tokens that did not fit into ``max_length``."""
    num_unstopped: int = 0
    """Whole rows (not cut) whose last answer has no stop token at its end."""
    num_straddling: int = 0
    """Tokens that cover the end of a prompt and the start of its answer at once."""
    longest: int = 0
    """Tokens of the longest row, before cutting."""

    @property
    def lost_ratio(self) -> float:
        """Share of the trained tokens that ``max_length`` took away."""
        whole = self.num_trained_tokens + self.num_lost_tokens
        return self.num_lost_tokens / whole if whole else 0.0

    def __str__(self) -> str:
        text = (
            f"{self.num_rows:,} rows, {self.num_tokens:,} tokens, {self.num_trained_tokens:,} of "
            f"them trained; longest row {self.longest:,}"
        )
        if self.num_cut:
            text += f"; {self.num_cut:,} rows cut, {self.lost_ratio:.1%} of trained tokens lost"
        if self.num_dropped:
            text += f"; {self.num_dropped:,} rows dropped"
        if self.num_straddling:
            text += f"; {self.num_straddling:,} tokens straddle a prompt's end"
        return text


class EncodedSplit(NamedTuple):
    """The rows of a split that are kept, where each came from, and what the others were."""

    rows: EncodedRows
    places: list[Place]
    conversations: list[Conversation]
    report: DataReport

    def select(self, indices: Sequence[int] | np.ndarray) -> EncodedSplit:
        """These rows, in this order, with a report of their own."""
        rows = self.rows.select(indices)
        report = DataReport(
            formats=self.report.formats,
            num_rows=len(rows),
            num_tokens=len(rows.input_ids),
            num_trained_tokens=int(rows.is_trained.sum()),
            longest=int(rows.lengths.max(initial=0)),
        )
        return EncodedSplit(
            rows,
            [self.places[index] for index in indices],
            [self.conversations[index] for index in indices],
            report,
        )


def encode_sources(
    sources: RowSources, encoder: Encoder, overlong: Overlong, max_lost_ratio: float, key: str
) -> EncodedSplit:
    """Read, convert, encode and check every row.

    Args:
        sources: Where the rows come from.
        encoder: Renders and tokenises.
        overlong: What happens to a row of more than ``max_length`` tokens.
        max_lost_ratio: Share of trained tokens that cutting may take away, in [0, 1].
        key: The configuration key of these sources, for errors.

    Raises:
        DatasetFormatError: naming the first row that is not what its format says.
        ConfigurationError: if nothing is left to train on, or more is lost than the budget allows.
    """
    report = DataReport()
    examples: list[EncodedExample] = []
    places: list[Place] = []
    kept: list[Conversation] = []
    stream = conversations(sources, report)
    while chunk := list(islice(stream, TOKENIZER_CHUNK)):
        encoded = _encode(chunk, encoder)
        for (place, conversation), its in zip(chunk, encoded, strict=True):
            for example in its if isinstance(its, list) else [its]:
                if _keep(example, place, encoder, overlong, report):
                    examples.append(example)
                    places.append(place)
                    kept.append(conversation)
    report.num_rows = len(examples)
    split = EncodedSplit(EncodedRows.from_examples(examples), places, kept, report)
    _check_split(split, encoder, max_lost_ratio, key)
    return split


def _encode(chunk: Sequence[tuple[Place, Conversation]], encoder: Encoder) -> list[EncodedExample]:
    try:
        return encoder.encode([conversation for _, conversation in chunk])
    except ConfigurationError:
        for place, conversation in chunk:  # once more, one by one, to name the row
            try:
                encoder.encode([conversation])
            except ConfigurationError as error:
                raise ConfigurationError(f"{place}: {error}") from error
        raise


def conversations(sources: RowSources, report: DataReport) -> Iterator[tuple[Place, Conversation]]:
    """Every row as a conversation with its place; notes the formats in the report."""
    formats: dict[int, str] = {}  # by source, not by file: two sources may read the same one
    for place, source, row in read_rows(sources):
        if id(source) not in formats:
            formats[id(source)] = _choose_format(place, source, row, report)
        name = formats[id(source)]
        try:
            conversation = FORMATS[name].convert(row)
        except RowError as error:
            raise DatasetFormatError(
                f"{place}: {error}. Set another format, or rename the columns "
                f"with columns: {{NEW: OLD}} (format '{name}')."
            ) from error
        if problem := conversation.problem():
            raise DatasetFormatError(f"{place}: {problem}. Mend or remove the row.")
        yield place, conversation


def _choose_format(
    place: Place, source: SourceConfig | None, row: Mapping[str, Any], report: DataReport
) -> str:
    if source is not None and source.format is not None:
        _note_format(place.source, source.format, report)
        return source.format
    try:
        name, runner_up = guess_format(list(row))
    except ConfigurationError as error:
        raise DatasetFormatError(f"{place}: {error}") from error
    said = f"{name} (guessed; {runner_up} would fit too)" if runner_up else f"{name} (guessed)"
    _note_format(place.source, said, report)
    logger.info("%s: format %s", place.source, said)
    return name


def _note_format(source: str, said: str, report: DataReport) -> None:
    known = report.formats.get(source)
    report.formats[source] = said if known in (None, said) else f"{known}; {said}"


def _keep(
    example: EncodedExample, place: Place, encoder: Encoder, overlong: Overlong, report: DataReport
) -> bool:
    length = len(example.input_ids)
    is_cut = example.num_cut_tokens > 0
    report.longest = max(report.longest, length + example.num_cut_tokens)
    if is_cut and overlong == "error":
        raise DatasetFormatError(
            f"{place}: {length + example.num_cut_tokens} tokens, more than data.max_length "
            f"{encoder.max_length}. Raise it, or set data.overlong: cut or drop."
        )
    report.num_lost_tokens += example.num_lost_tokens
    num_trained = int(example.is_trained.sum())
    if (is_cut and overlong == "drop") or example.num_answer_tokens == 0:
        report.num_dropped += 1
        report.num_lost_tokens += num_trained
        return False
    report.num_cut += is_cut
    report.num_tokens += length
    report.num_trained_tokens += num_trained
    # A cut row loses its stop token, which is counted; a whole row without one never teaches it.
    report.num_unstopped += not (is_cut or example.ends_in_stop)
    report.num_straddling += example.num_straddling
    return True


def _check_split(split: EncodedSplit, encoder: Encoder, max_lost_ratio: float, key: str) -> None:
    report = split.report
    if report.num_rows == 0:
        reason = (
            f"no answer fits into data.max_length {encoder.max_length} (the longest row has "
            f"{report.longest} tokens)"
            if report.num_dropped
            else "there are no rows"
        )
        raise ConfigurationError(f"{key}: nothing to train on, {reason}.")
    if report.lost_ratio > max_lost_ratio:
        raise ConfigurationError(
            f"{key}: data.max_length {encoder.max_length} takes away {report.lost_ratio:.1%} of "
            f"the trained tokens, data.max_lost_ratio allows {max_lost_ratio:.1%}; the longest row "
            f"has {report.longest} tokens."
        )
    if report.num_unstopped:
        raise ConfigurationError(
            f"{key}: {report.num_unstopped} rows do not end in a trained stop token under the "
            f"template '{encoder.template.name}', so the model would not learn to stop; choose "
            "another data.template."
        )
