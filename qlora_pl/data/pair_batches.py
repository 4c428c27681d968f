"""Pairs of a source and a target, kept as one row each, -> batches of an encoder-decoder model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qlora_pl.batch import FILLER_ROW, IGNORE_INDEX, Seq2SeqBatch
from qlora_pl.data.encoded_rows import EncodedRows
from qlora_pl.data.ordering import padded_width


def collate_pairs(
    rows: EncodedRows,
    row_ids: np.ndarray,
    pad_id: int,
    max_length: int | None = None,
    max_target_length: int | None = None,
) -> Seq2SeqBatch:
    """Take pairs apart and pad each side on the right, to a multiple of 8.

    No pairs at all give one padding token on either side without a label, as ``collate`` does.

    Args:
        rows: Pairs, as ``Seq2SeqEncoder`` makes them.
        row_ids: Which of them.
        pad_id: The id that fills short sources.
        max_length: Pad sources to so many tokens (rounded up) instead of to the longest.
        max_target_length: With ``max_length``: what targets are padded to; None: the same.
    """
    sources, targets, weights = [], [], []
    for row in row_ids:
        ids, labels = rows[row]
        first = int(np.argmax(labels != IGNORE_INDEX))
        sources.append(ids[:first])
        targets.append(labels[first:])
        of_row = rows.weights(row)
        if of_row is not None:
            weights.append(of_row[first:])
    if not sources:
        sources, targets = [np.full(1, pad_id)], [np.full(1, IGNORE_INDEX)]
        row_ids = np.array([FILLER_ROW])
    target_width = None if max_length is None else max_target_length or max_length
    input_ids, attention_mask = _pad(sources, pad_id, max_length)
    padded_labels, decoder_attention_mask = _pad(targets, IGNORE_INDEX, target_width)
    batch: Seq2SeqBatch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": padded_labels,
        "decoder_attention_mask": decoder_attention_mask,
        "row_ids": torch.from_numpy(np.asarray(row_ids, dtype=np.int64)),
    }
    if weights:
        batch["loss_weights"] = _pad(weights, 1, target_width)[0]
    return batch


def _pad(
    sides: Sequence[np.ndarray], filler: int, width: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, T)`` values of the sides' type, and 1 where they are not padding."""
    shape = (len(sides), padded_width(max(width or 1, *(len(side) for side in sides))))
    padded = np.full(shape, filler, dtype=sides[0].dtype)
    mask = np.zeros(shape, dtype=np.int64)
    for place, side in enumerate(sides):
        padded[place, : len(side)] = side
        mask[place, : len(side)] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)
