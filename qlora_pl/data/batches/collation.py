"""Rows -> the tensors of a batch: padded, packed, or prompts.

Rows come from an ``EncodedRows``: ``rows[i]`` gives ids and labels, and ``rows.weights(i)``, where
there is such a method, what the losses of its tokens are multiplied by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qlora_pl.batch import FILLER_ROW, IGNORE_INDEX, Batch, PackingProbe, PromptBatch
from qlora_pl.data.batches.ordering import padded_width
from qlora_pl.data.rows.encoded_rows import EncodedRows

NO_ROW = np.zeros(0, dtype=np.int64)
PROBE_TOKENS = 48
"""Tokens of a row of a probe: its last ones, where answers are."""
PROBE_ROWS = 2
"""Rows of each line of a probe."""


def collate(
    rows: EncodedRows, row_ids: np.ndarray, pad_id: int, max_length: int | None = None
) -> Batch:
    """Pad rows on the right to the longest of them, rounded up to a multiple of 8.

    No rows at all give one padding token without a label: a device that has run out of rows keeps
    step with the others and adds nothing to the loss.

    Args:
        rows: The split.
        row_ids: ``(B,)`` which of them.
        pad_id: The id that fills short rows.
        max_length: Pad to so many tokens (rounded up) instead of to the longest row.
    """
    lines = [np.array([row]) for row in row_ids] or [NO_ROW]
    arrays = _fill(rows, lines, pad_id, max_length)
    attention_mask = np.zeros_like(arrays["input_ids"])
    for place, length in enumerate(arrays.pop("document_lengths")):
        attention_mask[place, :length] = 1
    return _as_batch(arrays, attention_mask=attention_mask)


def collate_packs(
    rows: EncodedRows, packs: Sequence[np.ndarray], pad_id: int, max_length: int | None = None
) -> Batch:
    """Put the rows of each pack one after the other, each with positions of its own from 0 on.

    The first token of a row is never a label: the token before it is of another row. What is left
    of a line is padding with positions from 0, one more document that no row looks at.

    Args:
        rows: The split.
        packs: The rows of each line; none at all give one line of padding, as in ``collate``.
        pad_id: The id that fills what is left of a line.
        max_length: Fill lines up to so many tokens (rounded up) instead of to the longest.
    """
    lines = list(packs) or [NO_ROW]
    arrays = _fill(rows, lines, pad_id, max_length)
    lengths = iter(arrays["document_lengths"].tolist())
    position_ids = np.zeros_like(arrays["input_ids"])
    for line, pack in enumerate(lines):
        start = 0
        for length in [next(lengths) for _ in pack]:
            position_ids[line, start : start + length] = np.arange(length)
            arrays["labels"][line, start] = IGNORE_INDEX
            start += length
        position_ids[line, start:] = np.arange(position_ids.shape[1] - start)
    return _as_batch(arrays, position_ids=position_ids)


def _fill(
    rows: EncodedRows, lines: Sequence[np.ndarray], pad_id: int, max_length: int | None
) -> dict[str, np.ndarray]:
    """Lines of rows one after the other, and what both shapes of a batch have."""
    row_ids = np.concatenate(lines)
    picked = [[rows[row] for row in line] for line in lines]
    lengths = [[len(ids) for ids, _ in line] for line in picked]
    width = padded_width(max(max_length or 1, *(sum(line) for line in lengths)))
    shape = (len(lines), width)
    arrays = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
        "row_ids": row_ids.astype(np.int64) if len(row_ids) else np.array([FILLER_ROW]),
        "document_lengths": np.array([n for line in lengths for n in line] or [1], np.int64),
    }
    weights = _weights(rows, row_ids)
    if weights is not None:
        arrays["loss_weights"] = np.ones(shape, dtype=np.float32)
    for place, line in enumerate(picked):
        start = 0
        for row, (ids, labels) in zip(lines[place], line, strict=True):
            span = slice(start, start + len(ids))
            arrays["input_ids"][place, span] = ids
            arrays["labels"][place, span] = labels
            if weights is not None and (own := weights[row]) is not None:
                arrays["loss_weights"][place, span] = own
            start = span.stop
    return arrays


def _weights(rows: Any, row_ids: np.ndarray) -> dict[int, np.ndarray | None] | None:
    """What the rows' losses are multiplied by; None if nothing is."""
    weights_of = getattr(rows, "weights", None)
    if weights_of is None:
        return None
    weights = {row: weights_of(row) for row in row_ids.tolist()}
    return weights if any(weight is not None for weight in weights.values()) else None


def _as_batch(arrays: dict[str, np.ndarray], **more: np.ndarray) -> Batch:
    tensors = {name: torch.from_numpy(array) for name, array in (arrays | more).items()}
    return tensors  # type: ignore[return-value]


def make_packing_probe(rows: EncodedRows, pad_id: int, num_lines: int) -> PackingProbe:
    """The ends of the first rows: as packs, padded, and one by one.

    Args:
        rows: The training split; one with few rows is gone through again.
        pad_id: The id that fills what is left of a line.
        num_lines: Packs; some kernels keep rows apart only where there is one.
    """
    ends: Any = _RowEnds(rows)
    row_ids = np.arange(num_lines * PROBE_ROWS) % len(rows)
    packed = collate_packs(ends, np.split(row_ids, num_lines), pad_id)
    apart = [collate(ends, row_ids[[place]], pad_id) for place in range(len(row_ids))]
    return PackingProbe(packed, collate(ends, row_ids, pad_id), apart)


class _RowEnds:
    def __init__(self, rows: EncodedRows) -> None:
        self.rows = rows

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = self.rows[row]
        return ids[-PROBE_TOKENS:], labels[-PROBE_TOKENS:]


def collate_prompts(
    prompts: Sequence[tuple[str, list[int]]],
    references: Sequence[str],
    row_ids: np.ndarray,
    pad_id: int,
) -> PromptBatch:
    """Pad prompts on the left: the answer of a right-padded prompt would follow its padding."""
    width = max((len(ids) for _, ids in prompts), default=1)
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for place, (_, ids) in enumerate(prompts):
        input_ids[place, width - len(ids) :] = torch.tensor(ids)
        attention_mask[place, width - len(ids) :] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "row_ids": torch.from_numpy(np.asarray(row_ids, dtype=np.int64)),
        "prompts": [text for text, _ in prompts],
        "references": list(references),
    }
