"""One row of a batch on its way to a client: its tokens as text, until it ends.

Rows of a batch may be of several clients. A row ends at its own stop token, text or length, and is
told then, while others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_pl.chat.streaming import TextStream
from qlora_pl.inference.answering import Encoded
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import RowAnswer, row_answer
from qlora_pl.serving.refusals import RefusedError


@dataclass(frozen=True)
class Piece:
    """More of an answer."""

    index: int
    text: str


@dataclass(frozen=True)
class Ended:
    """An answer is whole."""

    index: int
    answer: RowAnswer


Event = Piece | Ended | RefusedError


class Job:
    """What one client waits for.

    Args:
        name: Who answers: an adapter, or ``base``.
        decoding: How answers are drawn, with a seed of 0; the seed is in the rows' numbers.
        tell: Told what happens, from the thread of the model.
    """

    def __init__(self, name: str, decoding: DecodingConfig, tell: Callable[[Event], None]) -> None:
        self.name = name
        self.decoding = decoding
        self.tell = tell
        self.has_left = False
        """Whether nobody waits any more; set by the client's side, read after each token."""


@dataclass(frozen=True)
class Row:
    """One answer to one prompt."""

    job: Job
    index: int
    """Among the answers of its job."""
    prompt: Encoded
    """Whose number seeds what is drawn."""

    @property
    def kind(self) -> tuple[str, DecodingConfig]:
        """What rows of a batch have in common."""
        return self.job.name, self.job.decoding


class RowStream:
    """Tokens of a row -> pieces of text, and the answer at its end.

    Args:
        row: Whose they are.
        limit: Tokens of its answer at most.
        tokenizer: Ids -> text.
        stop_ids: Tokens that end an answer.
    """

    def __init__(self, row: Row, limit: int, tokenizer: Any, stop_ids: Collection[int]) -> None:
        self.row = row
        self.has_told = False
        self.has_ended = False
        self._limit = limit
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._stop = row.job.decoding.stop
        self._ids: list[int] = []
        self._text = TextStream(tokenizer.decode, self._tell, stop_ids, self._stop)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for more of it."""
        return not (self.has_ended or self.row.job.has_left)

    def put(self, value: Any) -> None:
        """The prompt's ids first, then each token; what follows the end is padding."""
        if self.has_ended:
            return
        is_prompt = value.dim() > 0
        self._text.put(value)
        if is_prompt:
            return
        token = int(value)
        self._ids.append(token)
        if token in self._stop_ids or len(self._ids) >= self._limit or self._has_stop():
            self._text.end()
            self.has_ended = True
            answer = row_answer(self._ids, self._limit, self._stop_ids, self._stop, self._tokenizer)
            self.row.job.tell(Ended(self.row.index, answer))

    def _has_stop(self) -> bool:
        if not self._stop:
            return False
        text = self._tokenizer.decode(self._ids)
        return any(mark in text for mark in self._stop)

    def _tell(self, text: str) -> None:
        self.has_told = True
        self.row.job.tell(Piece(self.row.index, text))


class BatchStreamer:
    """A streamer of transformers' ``generate`` for all rows of a batch."""

    def __init__(self, streams: Sequence[RowStream]) -> None:
        self._streams = streams

    def put(self, value: Any) -> None:
        """``(B, T)`` ids of the prompts first, then ``(B,)`` tokens."""
        for stream, own in zip(self._streams, value, strict=True):
            stream.put(own)

    def end(self) -> None:
        """There is no more; rows have told their end already."""
