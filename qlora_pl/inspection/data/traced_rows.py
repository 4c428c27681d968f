"""Chosen rows, token by token: its characters, whether it is trained, and whether it is cut off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.example import EncodedExample, TracedExample
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.places import Place
from qlora_pl.data.rows.chunks import trained_rows
from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.inspection.data.odd_rows import OddKind
from qlora_pl.inspection.data.run_data import Documents

ODD_KINDS_SHOWN = 4
"""Kinds of which a row is shown where none was asked for."""


class Choice(NamedTuple):
    """A conversation to show, and why."""

    split: str
    number: int
    reason: str


class ShownToken(NamedTuple):
    """One token of a shown row."""

    id: int | None
    """None: characters that became no token."""
    name: str
    """How the vocabulary spells it."""
    text: str
    """Its characters; where several tokens share one, the first of them has it."""
    is_trained: bool = False
    is_special: bool = False
    is_lost: bool = False
    """Whether the run leaves it out, for its row is too long."""
    weight: float = 1.0


class ShownRow(NamedTuple):
    """A row as it is before ``data.max_length``."""

    place: Place
    split: str
    reason: str
    text: str
    """What was tokenised."""
    tokens: list[ShownToken]
    num_pieces: int
    """Rows that the run makes of it: none if it is left out, several if it is split."""


# -- which rows ------------------------------------------------------------------------------------


def choose_rows(
    documents: Mapping[str, Documents],
    max_length: int | None,
    odd: Sequence[OddKind],
    wanted: Sequence[tuple[str, int]] = (),
    count: int | None = None,
) -> list[Choice]:
    """The rows that were asked for, or else those that tell most.

    Args:
        documents: By split.
        max_length: Tokens that a row may have; None: question and answer have a limit each.
        odd: What was found of each kind.
        wanted: Files and row numbers; an empty file: the only one.
        count: So many training rows, evenly spread. None, and nothing wanted: the first row, the
            longest, the one that loses most, and one of each of the first odd kinds.

    Raises:
        ConfigurationError: for a row that is not there.
    """
    train = documents["train"]
    if not wanted and count is None:
        return _distinct(_telling(train, documents, max_length, odd))
    choices = []
    if count is not None:
        numbers = np.linspace(0, len(train) - 1, min(count, len(train))).round().astype(int)
        choices += [Choice("train", int(number), "asked for") for number in numbers]
    if wanted:
        at = _by_place(documents)
        choices += [Choice(*at[_find(file, row, at)], "asked for") for file, row in wanted]
    return _distinct(choices)


def _telling(
    train: Documents,
    documents: Mapping[str, Documents],
    max_length: int | None,
    odd: Sequence[OddKind],
) -> Iterator[Choice]:
    rows = train.split.rows
    if not len(rows):
        return
    yield Choice("train", 0, "the first row")
    yield Choice("train", int(np.argmax(rows.lengths)), "the longest row")
    long_rows = [] if max_length is None else np.flatnonzero(rows.lengths > max_length).tolist()
    lost = [int((rows[row][1][max_length:] >= 0).sum()) for row in long_rows]
    if any(lost):
        yield Choice(
            "train", long_rows[int(np.argmax(lost))], "most trained tokens behind data.max_length"
        )
    if odd:
        at = _by_place(documents)
        for kind in odd[:ODD_KINDS_SHOWN]:
            yield Choice(*at[kind.examples[0][0]], kind.name)


def _distinct(choices: Any) -> list[Choice]:
    """Each row once, with all its reasons."""
    reasons: dict[tuple[str, int], list[str]] = {}
    for split, number, reason in choices:
        told = reasons.setdefault((split, number), [])
        if reason not in told:
            told.append(reason)
    return [Choice(*row, "; ".join(told)) for row, told in reasons.items()]


def _by_place(documents: Mapping[str, Documents]) -> dict[Place, tuple[str, int]]:
    return {
        place: (name, number)
        for name, some in documents.items()
        for number, place in enumerate(some.places)
    }


def _find(file: str, row: int, at: Mapping[Place, Any]) -> Place:
    names = {place.source for place in at}
    fitting = [n for n in names if n == file or n.endswith(f"/{file}")] if file else list(names)
    if not fitting:
        end = did_you_mean(file, names)
        raise ConfigurationError(f"--row: no rows were read from '{file}'{end}")
    with_row = [name for name in fitting if Place(name, row) in at]
    if len(with_row) > 1:
        raise ConfigurationError(
            f"--row: {row} is in several files; write one of "
            f"{', '.join(f'{name}:{row}' for name in sorted(with_row))}."
        )
    if with_row:
        return Place(with_row[0], row)
    name = sorted(fitting)[0]
    last = max(place.row for place in at if place.source == name)
    raise ConfigurationError(
        f"--row: '{name}' has no row {row} that is trained or validated on (the last such is row "
        f"{last})."
    )


# -- what is shown of them -------------------------------------------------------------------------


def trace_rows(
    documents: Mapping[str, Documents],
    choices: Sequence[Choice],
    encoder: Encoder,
    limits: Limits,
) -> list[ShownRow]:
    """The rows of each chosen conversation, in order."""
    special = set(encoder.tokenizer.all_special_ids) | encoder.stop_ids
    shown = []
    for split, number, reason in choices:
        place, conversation = documents[split][number]
        traced = encoder.trace(conversation)
        for part, row in enumerate(traced, start=1):
            pieces = kept_positions(row.example, limits, encoder)
            tokens = list(_tokens(row, pieces, special, encoder.tokenizer))
            named = place._replace(part=part if len(traced) > 1 else 0)
            shown.append(ShownRow(named, split, reason, row.text, tokens, len(pieces)))
    return shown


def kept_positions(example: EncodedExample, limits: Limits, encoder: Encoder) -> list[np.ndarray]:
    """The places, in a whole row, of the tokens of each row that the run makes of it."""
    # Weights go wherever their tokens go: here each is its token's place.
    places = np.arange(len(example.input_ids), dtype=np.int64)
    numbered = example._replace(weights=places)
    rows = trained_rows(encoder.fit(numbered, limits), limits.overlong)
    return [row.weights for row in rows if row.weights is not None]


def _tokens(
    row: TracedExample, pieces: Sequence[np.ndarray], special: set[int], tokenizer: Any
) -> Iterator[ShownToken]:
    example = row.example
    kept = np.zeros(len(example.input_ids), dtype=bool)
    for places in pieces:
        kept[places] = True
    names = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    done = 0
    for place, (start, end) in enumerate(row.spans):
        if start > done:
            yield ShownToken(None, "", row.text[done:start])
        token = int(example.input_ids[place])
        yield ShownToken(
            token,
            names[place],
            row.text[max(start, done) : end],
            bool(example.is_trained[place]),
            token in special,
            not kept[place],
            1.0 if example.weights is None else float(example.weights[place]),
        )
        done = max(done, start, end)
    if done < len(row.text):
        yield ShownToken(None, "", row.text[done:])
