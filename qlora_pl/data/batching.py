"""Encoded rows -> batches, in an order that is a pure function of (seed, epoch, step).

The loader's index is a key (epoch, step, micro-batch), and the rows behind a key can be computed by
anyone at any time. So resuming needs one integer, workers change nothing, and no generator has to
be saved. A step's rows depend on the global batch alone, not on the devices and micro-batches that
it is cut into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from qlora_pl.batch import FILLER_ROW, IGNORE_INDEX, Batch, PromptBatch
from qlora_pl.data.encoded_rows import EncodedRows

STEPS_PER_LENGTH_GROUP = 50
"""Steps whose rows are sorted by length together (as transformers' LengthGroupedSampler)."""
WIDTH_MULTIPLE = 8
"""Widths of batches are multiples of it: tensor cores want that, and oneDNN keeps memory for every
width that it has seen (without it the quickstart grows from 1.8 to 2.6 GiB)."""

BatchMaker = Callable[[EncodedRows, np.ndarray, int], Any]
"""Rows, the numbers of those wanted, and the padding token's id, to a batch."""


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of one optimizer step are spread over devices and micro-batches."""

    batch_size: int
    """Rows of a micro-batch on one device."""
    accumulation: int = 1
    """Micro-batches that make one optimizer step."""
    world_size: int = 1
    """Devices that train side by side."""
    rank: int = 0

    @property
    def global_batch_size(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.accumulation * self.world_size

    def num_micro_batches(self, num_rows: int) -> int:
        """Micro-batches that each device makes of this many rows; the same on every device."""
        return math.ceil(num_rows / (self.batch_size * self.world_size))

    def rows_of(self, step_rows: np.ndarray, micro_batch: int) -> np.ndarray:
        """This device's rows of a micro-batch; may be empty at the end of an epoch."""
        start = (micro_batch * self.world_size + self.rank) * self.batch_size
        return step_rows[start : start + self.batch_size]


def epoch_steps(
    lengths: np.ndarray, global_batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> list[np.ndarray]:
    """Which rows form each optimizer step of an epoch; every row once.

    With grouping, the rows of 50 steps at a time are sorted by length and cut into steps, whose
    order is then shuffled; the first step of epoch 0 holds the longest row, so that a run which
    does not fit into memory fails at once. Rows within a step are sorted by length, longest first.

    Args:
        lengths: ``(num_rows,)`` tokens of each row.
        global_batch_size: Rows of a step; the last step of an epoch may have fewer.
        seed: Of the run.
        epoch: From 0.
        group_by_length: False: rows are only shuffled.

    Returns:
        One int64 array of row numbers for each step.
    """
    generator = keyed_generator(seed, epoch)
    order = generator.permutation(len(lengths))
    if group_by_length and epoch == 0 and len(order):
        # To the front, so that it is not among the rows of the last, incomplete step.
        order = np.roll(order, -int(np.argmax(lengths[order])))
    num_whole = len(order) // global_batch_size * global_batch_size
    whole, rest = order[:num_whole], order[num_whole:]
    steps = []
    group = STEPS_PER_LENGTH_GROUP * global_batch_size if group_by_length else global_batch_size
    for start in range(0, num_whole, group):
        rows = _longest_first(whole[start : start + group], lengths)
        steps += [rows[i : i + global_batch_size] for i in range(0, len(rows), global_batch_size)]
    if group_by_length:
        steps = [steps[i] for i in generator.permutation(len(steps))]
        if epoch == 0 and steps:
            longest = max(range(len(steps)), key=lambda i: lengths[steps[i]].max())
            steps.insert(0, steps.pop(longest))
    if len(rest):
        steps.append(_longest_first(rest, lengths))
    return steps


def keyed_generator(seed: int, stream: int) -> np.random.Generator:
    """A generator of its own for each (seed, stream): epoch 7 needs no epochs 0 to 6 drawn first.

    Args:
        seed: Any integer; negative ones count back from 2**64.
        stream: From 0.
    """
    # uint64: numpy makes floats of a list that holds a large and a small number
    key = np.array([seed & (2**64 - 1), stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-lengths[rows], kind="stable")]


class BatchKey(NamedTuple):
    """Names a micro-batch of a run."""

    epoch: int
    step: int
    micro_batch: int


class TrainingBatches(Dataset[Batch]):
    """The micro-batches of this device, by key.

    Args:
        rows: The training split.
        layout: How a step is cut.
        seed: Of the order.
        group_by_length: See ``epoch_steps``.
        pad_id: The id that fills short rows.
        make_batch: Puts rows together; None: ``collate``.
    """

    def __init__(
        self,
        rows: EncodedRows,
        layout: BatchLayout,
        seed: int,
        group_by_length: bool,
        pad_id: int,
        make_batch: BatchMaker | None = None,
    ) -> None:
        self.make_batch = make_batch or collate
        self.rows = rows
        self.layout = layout
        self.seed = seed
        self.group_by_length = group_by_length
        self.pad_id = pad_id
        self._steps = lru_cache(maxsize=2)(self._epoch_steps)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_steps"}

    def __setstate__(self, state: dict[str, object]) -> None:  # a cache does not travel to workers
        self.__dict__.update(state)
        self._steps = lru_cache(maxsize=2)(self._epoch_steps)

    def _epoch_steps(self, epoch: int) -> list[np.ndarray]:
        return epoch_steps(
            self.rows.lengths,
            self.layout.global_batch_size,
            self.seed,
            epoch,
            self.group_by_length,
        )

    def keys(self, epoch: int) -> list[BatchKey]:
        """Every key of an epoch, in order; equally many in every epoch and on every device."""
        return [
            BatchKey(epoch, step, micro_batch)
            for step, rows in enumerate(self._steps(epoch))
            for micro_batch in range(self.layout.num_micro_batches(len(rows)))
        ]

    def __len__(self) -> int:
        return len(self.keys(0))

    def __getitem__(self, key: BatchKey | int) -> Batch:
        if isinstance(key, int):  # Lightning's overfit_batches replaces the sampler by a plain one
            key = self.keys(0)[key]
        step_rows = self._steps(key.epoch)[key.step]
        return self.make_batch(
            self.rows, self.layout.rows_of(step_rows, key.micro_batch), self.pad_id
        )


class ResumableSampler(DistributedSampler[BatchKey]):
    """Yields the keys of an epoch from a given position on.

    A ``DistributedSampler`` in name, so that Lightning leaves it in place on several devices; the
    devices' shares are in the keys' layout.
    """

    def __init__(self, batches: TrainingBatches, epoch: int = 0, position: int = 0) -> None:
        self.batches = batches
        self.epoch = epoch
        self.position = position

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch; a resumed epoch keeps its position."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[BatchKey]:
        return iter(self.batches.keys(self.epoch)[self.position :])

    def __len__(self) -> int:
        return len(self.batches)  # of the whole epoch: Lightning counts the skipped part itself


class InOrderSampler(DistributedSampler[int]):
    """Counts through a device's share; a ``DistributedSampler`` for the same reason.

    Lightning would otherwise cut the share of each device once more, and rows would be left out.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.num_batches))

    def __len__(self) -> int:
        return self.num_batches


class EvaluationBatches(Dataset[Batch]):
    """This device's share of a split in a fixed order, longest rows first; every row once."""

    def __init__(
        self,
        rows: EncodedRows,
        layout: BatchLayout,
        pad_id: int,
        make_batch: BatchMaker | None = None,
    ) -> None:
        self.make_batch = make_batch or collate
        self.rows = rows
        self.layout = layout
        self.pad_id = pad_id
        self._order = _longest_first(np.arange(len(rows)), rows.lengths)

    def __len__(self) -> int:
        return self.layout.num_micro_batches(len(self.rows))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.make_batch(self.rows, self.layout.rows_of(self._order, index), self.pad_id)


def collate(rows: EncodedRows, row_ids: np.ndarray, pad_id: int) -> Batch:
    """Pad rows on the right to the longest of them, rounded up to a multiple of 8.

    No rows at all give one padding token without a label: a device that has run out of rows keeps
    step with the others and adds nothing to the loss.
    """
    picked = [rows[row] for row in row_ids]
    if not picked:
        picked, row_ids = [(np.full(1, pad_id), np.full(1, IGNORE_INDEX))], np.array([FILLER_ROW])
    longest = max(len(ids) for ids, _ in picked)
    width = math.ceil(longest / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    shape = (len(picked), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for place, (ids, row_labels) in enumerate(picked):
        input_ids[place, : len(ids)] = ids
        attention_mask[place, : len(ids)] = 1
        labels[place, : len(ids)] = row_labels
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "labels": torch.from_numpy(labels),
        "row_ids": torch.from_numpy(np.asarray(row_ids, dtype=np.int64)),
    }


class PromptBatches(Dataset[PromptBatch]):
    """This device's share of the prompts of a split, in the order of the file."""

    def __init__(
        self,
        prompts: Sequence[tuple[str, list[int]]],
        references: Sequence[str],
        layout: BatchLayout,
        pad_id: int,
    ) -> None:
        self.prompts = prompts
        self.references = references
        self.layout = layout
        self.pad_id = pad_id

    def __len__(self) -> int:
        return self.layout.num_micro_batches(len(self.prompts))

    def __getitem__(self, index: int) -> PromptBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row_ids = self.layout.rows_of(np.arange(len(self.prompts)), index)
        return collate_prompts(
            [self.prompts[row] for row in row_ids],
            [self.references[row] for row in row_ids],
            row_ids,
            self.pad_id,
        )


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
