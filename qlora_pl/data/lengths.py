"""What becomes of rows that are longer than a run allows; every trained token is accounted for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np

from qlora_pl.data.encoding import EncodedExample

Overlong = Literal["cut", "cut_keep_stop", "cut_prompt", "split", "drop", "error"]


def fit_to_length(
    example: EncodedExample, max_length: int, overlong: Overlong, stop_ids: Collection[int]
) -> list[EncodedExample]:
    """The rows that are left of an example, each of at most ``max_length`` tokens.

    Args:
        example: A row of any length.
        max_length: Tokens that a row may have.
        overlong: ``cut``: the right end goes, with the stop token. ``cut_keep_stop``: an answer
            that is cut gets its stop token back. ``cut_prompt``: the left end of what comes before
            the first trained token goes, and the right end only if that is not enough. ``split``:
            into consecutive pieces. ``drop`` and ``error``: no row is left.
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


def fit_to_train(
    example: EncodedExample, max_length: int, overlong: Overlong, stop_ids: Collection[int]
) -> list[EncodedExample]:
    """Those rows of ``fit_to_length`` of which something of an answer is trained."""
    fitted = fit_to_length(example, max_length, overlong, stop_ids)
    return [row for row in fitted if (row.is_answer & row.is_trained).any()]


def num_removable(example: EncodedExample) -> int:
    """Tokens between BOS and the first trained token."""
    first = int(np.argmax(example.is_trained)) if example.is_trained.any() else example.num_bos
    return max(0, first - example.num_bos)


def needed_lengths(example: EncodedExample, overlong: Overlong) -> np.ndarray:
    """For each trained token, the ``max_length`` from which on it is kept.

    Returns:
        ``(num_trained,)`` int64.
    """
    positions = np.flatnonzero(example.is_trained)
    if overlong in ("drop", "error"):
        return np.full(len(positions), len(example.input_ids), dtype=np.int64)
    if overlong == "cut_prompt":
        # Of a row that is cut further, the tokens count from where the prompt has gone.
        return positions + 1 - num_removable(example)
    if overlong == "split":
        return np.ones(len(positions), dtype=np.int64)
    return positions + 1


def _keep_stop(
    example: EncodedExample, max_length: int, stop_ids: Collection[int]
) -> EncodedExample:
    cut = max_length - 1  # the first token that goes, if the stop token takes the last place
    if not (example.is_trained[cut] and example.is_trained[cut - 1]):
        return example.part(slice(max_length))
    beyond = example.input_ids[cut:]
    ends = np.flatnonzero(np.isin(beyond, list(stop_ids)) & example.is_trained[cut:])
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
