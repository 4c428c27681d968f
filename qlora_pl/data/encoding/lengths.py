"""What becomes of rows that are longer than a run allows; every trained token is accounted for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qlora_pl.data.encoding.example import EncodedExample

Overlong = Literal["cut", "cut_keep_stop", "cut_prompt", "split", "drop", "error"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long rows may be, and how much may be lost to that."""

    max_length: int = 512
    """Tokens of a row; of what comes before its answer where that has a limit of its own."""
    max_target_length: int | None = None
    """Tokens of the answer of a row that is a pair; None: rows are not pairs."""
    overlong: Overlong = "cut"
    max_lost_ratio: float = 0.01

    def __str__(self) -> str:
        if self.max_target_length is None:
            return f"data.max_length {self.max_length}"
        return (
            f"data.max_length {self.max_length} or data.max_target_length {self.max_target_length}"
        )

    @property
    def answer_key(self) -> str:
        """The key whose value decides how much of an answer is kept."""
        return "data.max_length" if self.max_target_length is None else "data.max_target_length"

    @property
    def answer_limit(self) -> int:
        """That key's value."""
        return self.max_length if self.max_target_length is None else self.max_target_length


def fit_to_length(
    example: EncodedExample, max_length: int, overlong: Overlong, stop_ids: Collection[int]
) -> list[EncodedExample]:
    """The rows that are left of an example, each of at most ``max_length`` tokens.

    Args:
        example: A row of any length.
        max_length: Tokens that a row may have.
        overlong: ``cut``: the right end goes, with the stop token. ``cut_keep_stop``: an answer
            that is cut gets its stop token back, unless one token of it is all that is left.
            ``cut_prompt``: the left end of what comes before the first trained token goes, and the
            right end only if that is not enough. ``split``: into consecutive pieces. ``drop`` and
            ``error``: no row is left.
        stop_ids: Tokens that end an answer.
    """
    length = len(example.input_ids)
    if length <= max_length:
        return [example]
    if overlong == "cut":
        return [example.part(slice(max_length))]
    if overlong == "cut_keep_stop":
        return [_keep_stop(example, max_length, stop_ids)]
    if overlong == "cut_prompt":
        gap = min(length - max_length, num_removable(example))
        kept = np.r_[: example.num_bos, example.num_bos + gap : min(length, max_length + gap)]
        return [example.part(kept)]
    if overlong == "split":
        return _pieces(example, max_length)
    return []


def num_removable(example: EncodedExample) -> int:
    """Tokens between BOS and the first trained token."""
    first = int(np.argmax(example.is_trained)) if example.is_trained.any() else example.num_bos
    return max(0, first - example.num_bos)


def needed_lengths(example: EncodedExample, overlong: Overlong) -> np.ndarray:
    """For each trained token, the ``max_length`` from which on it is kept.

    A row that has no token of an answer left is dropped, and what else was trained of it with it;
    pieces of a split row stay whatever they hold.

    Args:
        example: A row that is worth training.
        overlong: What becomes of it where it is too long.

    Returns:
        ``(num_trained,)`` int64.
    """
    positions = np.flatnonzero(example.is_trained)
    if overlong in ("drop", "error"):
        return np.full(len(positions), len(example.input_ids), dtype=np.int64)
    if overlong == "split":
        return np.ones(len(positions), dtype=np.int64)
    # Of a row that is cut further, the tokens count from where the prompt has gone.
    num_gone = num_removable(example) if overlong == "cut_prompt" else 0
    first_answer = int(np.argmax(example.is_answer & example.is_trained))
    return np.maximum(positions, first_answer) + 1 - num_gone


def _keep_stop(
    example: EncodedExample, max_length: int, stop_ids: Collection[int]
) -> EncodedExample:
    cut = max_length - 1  # the first token that goes, if the stop token takes the last place
    is_learnt = example.is_answer & example.is_trained
    if not (is_learnt[cut] and is_learnt[cut - 1]):
        return example.part(slice(max_length))
    beyond = example.input_ids[cut:]
    ends = np.flatnonzero(np.isin(beyond, list(stop_ids)) & is_learnt[cut:])
    if not len(ends):
        return example.part(slice(max_length))
    return example.part(np.r_[:cut, cut + ends[0]])


def _pieces(example: EncodedExample, max_length: int) -> list[EncodedExample]:
    step = max_length - example.num_bos
    pieces = []
    for start in range(example.num_bos, len(example.input_ids), step):
        end = min(start + step, len(example.input_ids))
        piece = example.part(np.r_[: example.num_bos, start:end])
        if piece.is_trained.any():
            pieces.append(piece)
    return pieces


# -- pairs: a source and a target, each with a limit of its own ------------------------------------


def source_length(example: EncodedExample) -> int:
    """Tokens before the answer begins; all of them if there is none."""
    return int(np.argmax(example.is_answer)) if example.is_answer.any() else len(example.is_answer)


def fit_pair(example: EncodedExample, limits: Limits, source_tail: int = 0) -> list[EncodedExample]:
    """A pair whose sides are cut on the right, each to its own limit; or nothing.

    Args:
        example: A source, then its target.
        limits: ``overlong`` is ``cut``, ``drop`` or ``error``.
        source_tail: Tokens at the source's end that a cut keeps, such as its end-of-text token.
    """
    source, length = source_length(example), len(example.input_ids)
    target_limit = limits.answer_limit
    if source <= limits.max_length and length - source <= target_limit:
        return [example]
    if limits.overlong != "cut":
        return []
    kept = min(source, limits.max_length)
    end = min(length, source + target_limit)
    return [example.part(np.r_[: kept - source_tail, source - source_tail : source, source:end])]


def needed_target_lengths(example: EncodedExample) -> np.ndarray:
    """For each trained token of a target, the ``max_target_length`` from which on it is kept.

    Returns:
        ``(num_trained,)`` int64; trained tokens of the source need 1.
    """
    positions = np.flatnonzero(example.is_trained) - source_length(example) + 1
    return np.maximum(positions, 1)
