"""The largest micro-batch that a run can come to, and what ``data.batch_size: auto`` may become.

How many rows go through the model at a time is a question of memory and not of the experiment, as
long as the rows of a step stay the same. So the sizes are the divisors of a device's share of it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from qlora_pl.batch import Batch
from qlora_pl.data.batches.collation import collate, collate_packs
from qlora_pl.data.batches.global_batch import AUTO, SHARE
from qlora_pl.data.batches.ordering import (
    COMPOSITION,
    keyed_generator,
    longest_first,
    padded_width,
)
from qlora_pl.data.batches.packing import pack_rows
from qlora_pl.data.batches.pair_batches import collate_pairs
from qlora_pl.data.rows.encoded_rows import EncodedRows

ROWS = 4
"""Of a micro-batch, where nobody has asked for another number."""


class Width(NamedTuple):
    """Tokens of a line, padding included."""

    tokens: int
    targets: int | None = None
    """Of the decoder, where it has lines of its own."""


def first_size(batch_size: int | Literal["auto"], global_batch_size: int | None) -> int:
    """The rows of a micro-batch; while ``auto`` is not settled, a size that is possible.

    That one is what commands go by that look at rows and train nothing.
    """
    if batch_size != AUTO:
        return int(batch_size)
    return max(size for size in range(1, ROWS + 1) if (global_batch_size or SHARE) % size == 0)


def take_size(data: Any, batch_size: int) -> None:
    """Settle a data module's size, and that of its evaluation unless it has one of its own.

    Args:
        data: An ``InstructionDataModule``, which has made no loaders yet.
        batch_size: Rows, or packs.
    """
    own, data.asked_batch_size = data.asked_eval_batch_size, batch_size
    data.batch_size, data.eval_batch_size = batch_size, batch_size if own is None else own


def largest_width(data: Any) -> Width:
    """The widest line that training can come to.

    Args:
        data: An ``InstructionDataModule`` that has read its rows. Of windows only the first is
            known, so a row may have as many tokens as it ever may.
    """
    rows = _rows(data)
    if data.encoder.is_paired:
        sources, targets = rows.lengths - rows.num_trained, rows.num_trained
        return Width(padded_width(int(sources.max())), padded_width(int(targets.max())))
    is_full = data.packing is not False or data.padding == "max_length"
    return Width(padded_width(max(int(rows.lengths.max()), data.max_length if is_full else 0)))


def largest_batch(data: Any, size: int) -> Batch:
    """As many of the longest lines as a micro-batch has, of a run's own rows.

    No micro-batch of any epoch is wider or has more lines, however rows are ordered.

    Args:
        data: An ``InstructionDataModule`` that has read its rows and knows whether they are packed.
        size: Rows, or packs.
    """
    rows, pad_id = _rows(data), data.tokenizer.pad_token_id
    if data.is_packed:
        everything, generator = np.arange(len(rows)), keyed_generator(0, 0, COMPOSITION)
        made = pack_rows(rows.lengths, everything, data.max_length, generator)
        packs = [made[number] for number in range(len(made))]
        packs.sort(key=lambda pack: -int(rows.lengths[pack].sum()))
        lines = [packs[number % len(packs)] for number in range(size)]
        return collate_packs(rows, lines, pad_id, data.max_length)
    longest = longest_first(np.arange(len(rows)), rows.lengths)
    if data.encoder.is_paired:
        ends = [(rows.lengths - rows.num_trained).argmax(), rows.num_trained.argmax()]
        widest = dict.fromkeys([*(ends if size > 1 else []), *longest.tolist()])
        chosen = np.resize(np.array(list(widest)), size)
        return collate_pairs(rows, chosen, pad_id)  # type: ignore[return-value]
    width = data.max_length if data.padding == "max_length" else None
    return collate(rows, np.resize(longest, size), pad_id, width)


def _rows(data: Any) -> EncodedRows:
    rows: EncodedRows = data.splits["train"].rows
    if data.window is None:
        return rows
    targets = data.max_target_length or (data.max_length if data.encoder.is_paired else 0)
    length, num_trained = data.max_length + targets, targets or data.max_length // 2
    return EncodedRows(
        input_ids=np.resize(rows.input_ids[:1], length),
        is_trained=np.arange(length) >= length - num_trained,
        starts=np.zeros(1, np.int64),
        lengths=np.array([length], np.int64),
        num_trained=np.array([num_trained], np.int64),
    )
