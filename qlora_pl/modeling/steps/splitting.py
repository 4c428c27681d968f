"""A batch in pieces, cut between rows, for a model that has no memory for all of it.

A row's loss is the same whatever goes through the model beside it, so rows stay whole. Lines are
dealt out whole; where there are fewer lines than pieces, packed ones are cut between their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from qlora_pl.batch import IGNORE_INDEX


def split_batch(batch: Mapping[str, Any], num_pieces: int) -> list[dict[str, Any]]:
    """Cut a batch into so many pieces, or into as many as it has rows.

    Packed rows without a trained token add nothing to a loss and may be left out, and with them the
    padding. What a batch says of each packed row beside its tokens is left out too.

    Args:
        batch: Any of ``qlora_pl.batch``.
        num_pieces: 1 gives the batch itself.
    """
    num_lines = len(batch["input_ids"])
    if num_pieces <= 1:
        return [dict(batch)]
    if "position_ids" not in batch:
        return [_take(batch, span) for span in _spans(num_lines, num_pieces)]
    names = ("input_ids", "labels", "position_ids", "loss_weights")
    packed = {name: batch[name] for name in names if name in batch}
    lines = [_take(packed, span) for span in _spans(num_lines, num_pieces)]
    of_each = -(-num_pieces // num_lines)
    return lines if of_each == 1 else [part for line in lines for part in _cut(line, of_each)]


def _take(batch: Mapping[str, Any], span: slice) -> dict[str, Any]:
    return {name: value[span] for name, value in batch.items()}


def _spans(count: int, num_pieces: int) -> list[slice]:
    """Slices of ``range(count)``, as equal as can be, none of them empty."""
    pieces = max(1, min(count, num_pieces))
    ends = [count * piece // pieces for piece in range(pieces + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _cut(line: Mapping[str, Any], num_pieces: int) -> list[dict[str, Any]]:
    """A single packed line, cut between rows."""
    starts = (line["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], line["position_ids"].shape[1]]
    is_trained = (line["labels"][0] != IGNORE_INDEX).cpu()
    rows = [(s, e) for s, e in zip(starts, ends, strict=True) if is_trained[s:e].any()]
    if not rows:
        return [dict(line)]
    pieces = [rows[span] for span in _spans(len(rows), num_pieces)]
    return [
        {name: value[:, piece[0][0] : piece[-1][1]] for name, value in line.items()}
        for piece in pieces
    ]
