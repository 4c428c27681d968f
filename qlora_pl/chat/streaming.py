"""Tokens -> text as they come, without half characters and without what ends the answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What a tokenizer makes of the first bytes of a character."""


class TextStream:
    """A streamer of transformers' ``generate``, for one row.

    Args:
        decode: Ids -> text.
        emit: Told each piece of text.
        stop_ids: Tokens that end the answer.
        stop: Texts that end it; what may become one is held back.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        emit: Callable[[str], None],
        stop_ids: Collection[int],
        stop: Sequence[str] = (),
    ) -> None:
        self._decode = decode
        self._emit = emit
        self._stop_ids = stop_ids
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._told = 0
        self._has_begun = False

    def put(self, value: Any) -> None:
        """The prompt's ids first, then each token."""
        if not self._has_begun:
            self._has_begun = True
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._stop_ids]
        self._tell(self._ids, is_last=False)

    def end(self) -> None:
        """There is no more."""
        self._tell(self._ids, is_last=True)

    def _tell(self, ids: list[int], is_last: bool) -> None:
        text = self._decode(ids)
        ends = [place for place in (text.find(mark) for mark in self._stop) if place >= 0]
        if ends:
            text = text[: min(ends)]
        elif not is_last:
            text = text[: len(text) - held_back(text, self._stop)]
        text = text.lstrip()  # not before: a text that ends the answer may begin with a line break
        if is_last:
            text = text.rstrip(UNFINISHED).rstrip()  # cut at a length, within a character
        if len(text) > self._told:
            self._emit(text[self._told :])
            self._told = len(text)


def held_back(text: str, stop: Sequence[str] = ()) -> int:
    """Characters at the end of a text that the next token may change or take away.

    Args:
        text: So far.
        stop: Texts that end an answer.
    """
    unfinished = len(text) - len(text.rstrip(UNFINISHED))
    spaces = len(text) - len(text.rstrip())
    begun = [
        size
        for mark in stop
        for size in range(1, min(len(mark), len(text) + 1))
        if text.endswith(mark[:size])
    ]
    return max([unfinished, spaces, *begun])
