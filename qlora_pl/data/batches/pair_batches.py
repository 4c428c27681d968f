"""Pairs of a source and a target, kept as one row each, -> batches of an encoder-decoder model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qlora_pl.batch import FILLER_ROW, IGNORE_INDEX, Seq2SeqBatch
from qlora_pl.data.batches.ordering import padded_width
from qlora_pl.data.rows.encoded_rows import EncodedRows


def collate_pairs(rows: EncodedRows, row_ids: np.ndarray, pad_id: int) -> Seq2SeqBatch:
    """Take pairs apart and pad each side on the right, to a multiple of 8.

    No pairs at all give one padding token on either side without a label, as ``collate`` does.

    Args:
        rows: Pairs, as ``Seq2SeqEncoder`` makes them.
        row_ids: Which of them.
        pad_id: The id that fills short sources.
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
    input_ids, attention_mask = _pad(sources, pad_id)
    padded_labels, decoder_attention_mask = _pad(targets, IGNORE_INDEX)
    batch: Seq2SeqBatch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": padded_labels,
        "decoder_attention_mask": decoder_attention_mask,
        "row_ids": torch.from_numpy(np.asarray(row_ids, dtype=np.int64)),
    }
    if weights:
        batch["loss_weights"] = _pad(weights, 1)[0]
    return batch


def _pad(sides: Sequence[np.ndarray], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, T)`` values of the sides' type, and 1 where they are not padding."""
    width = padded_width(max(len(side) for side in sides))
    padded = np.full((len(sides), width), filler, dtype=sides[0].dtype)
    mask = np.zeros((len(sides), width), dtype=np.int64)
    for place, side in enumerate(sides):
        padded[place, : len(side)] = side
        mask[place, : len(side)] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)
