"""Encoded rows -> batches, in an order that is a pure function of (seed, epoch, step).

The loader's index is a key (epoch, step, micro-batch), and the rows behind a key can be computed by
anyone at any time. So resuming needs one integer, workers change nothing, and no generator has to
be saved. A step's rows depend on the global batch alone, not on the devices and micro-batches that
it is cut into.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from qlora_pl.batch import Batch, PromptBatch
from qlora_pl.data.batches.collation import collate, collate_packs, collate_prompts
from qlora_pl.data.batches.ordering import (
    COMPOSITION,
    Steps,
    epoch_rows,
    fill_to_budget,
    keyed_generator,
    longest_first,
    order_steps,
)
from qlora_pl.data.batches.packing import Ragged, describe_packing, pack_rows
from qlora_pl.data.batches.pair_batches import collate_pairs
from qlora_pl.data.rows.encoded_rows import EncodedRows


@dataclass(frozen=True)
class BatchLayout:
    """How the units of one optimizer step are spread over devices and micro-batches.

    A unit is what is not divided: a row, or a pack of rows.
    """

    batch_size: int
    """Units of a micro-batch on one device."""
    accumulation: int = 1
    """Micro-batches that make one optimizer step."""
    world_size: int = 1
    """Devices that train side by side."""
    rank: int = 0

    @property
    def global_batch_size(self) -> int:
        """Units of one optimizer step."""
        return self.batch_size * self.accumulation * self.world_size

    def num_micro_batches(self, num_units: int) -> int:
        """Micro-batches that each device makes of so many units; the same on every device."""
        return math.ceil(num_units / (self.batch_size * self.world_size))

    def rows_of(self, step_units: np.ndarray, micro_batch: int) -> np.ndarray:
        """This device's units of a micro-batch; may be empty at the end of an epoch."""
        start = (micro_batch * self.world_size + self.rank) * self.batch_size
        return step_units[start : start + self.batch_size]


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """What a micro-batch is made of."""

    max_length: int | None = None
    """Tokens of a pack, and of every line with ``pads_to_max_length``."""
    is_packed: bool = False
    """Whether a line is a pack of rows; a unit of the layout then is a pack."""
    pads_to_max_length: bool = False
    """Whether all batches are equally wide. False: each is as wide as its longest line."""
    tokens_per_batch: int | None = None
    """Tokens of a micro-batch at most, padding included; a unit then is a whole micro-batch, and
    the layout's ``batch_size`` has no meaning. None: batches of ``batch_size`` units."""
    is_paired: bool = False
    """Whether rows are pairs of a source and a target."""

    @property
    def width(self) -> int | None:
        """The length to fill every line to; None: the longest of its batch."""
        return self.max_length if self.pads_to_max_length else None


class BatchKey(NamedTuple):
    """Names a micro-batch of a run."""

    epoch: int
    step: int
    micro_batch: int


class _Epoch(NamedTuple):
    """What is trained on in an epoch, and when."""

    units: Ragged
    steps: Steps


class TrainingBatches(Dataset[Batch]):
    """The micro-batches of this device, by key.

    Args:
        rows: The training split.
        layout: How a step is cut.
        seed: Of the order.
        group_by_length: See ``order_steps``; packs and micro-batches of a token budget are as large
            as each other anyway and are only shuffled.
        pad_id: The id that fills short rows.
        shape: What a micro-batch is made of.
        multiplicity: See ``epoch_rows``; None: every row once an epoch. With packs or a token
            budget, all epochs have the rows of the first, so that all have equally many steps.
    """

    def __init__(
        self,
        rows: EncodedRows,
        layout: BatchLayout,
        seed: int,
        group_by_length: bool,
        pad_id: int,
        shape: BatchShape = BatchShape(),
        multiplicity: np.ndarray | None = None,
    ) -> None:
        self.rows = rows
        self.layout = layout if shape.tokens_per_batch is None else replace(layout, batch_size=1)
        self.seed = seed
        self.group_by_length = group_by_length
        self.pad_id = pad_id
        self.shape = shape
        self.multiplicity = multiplicity
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)
        units = self._epoch(0).units if self.regroups_rows else self._units(0)
        self.num_units = len(units)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, object]) -> None:  # a cache does not travel to workers
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)

    @property
    def regroups_rows(self) -> bool:
        """Whether a unit is more than a row: a pack, or the micro-batch of a token budget."""
        return self.shape.is_packed or self.shape.tokens_per_batch is not None

    def _units(self, epoch: int) -> Ragged:
        """The units of an epoch, before they are ordered; equally many in every epoch."""
        drawn = 0 if self.regroups_rows else epoch
        rows = epoch_rows(len(self.rows), self.multiplicity, self.seed, drawn)
        if not self.regroups_rows:
            return Ragged(rows, np.arange(len(rows) + 1))
        generator = keyed_generator(self.seed, epoch, COMPOSITION)
        lengths, capacity = self.rows.lengths, self.shape.max_length
        if self.shape.is_packed:
            assert capacity is not None
            return pack_rows(lengths, rows, capacity, generator)
        assert self.shape.tokens_per_batch is not None
        if self.shape.width is not None:
            lengths = np.full_like(lengths, self.shape.width)
        return fill_to_budget(lengths, rows, self.shape.tokens_per_batch, generator)

    def _compute_epoch(self, epoch: int) -> _Epoch:
        units = self._units(epoch)
        lengths = self.rows.lengths
        if self.shape.tokens_per_batch is not None:  # the widest costs attention the most
            sizes = lengths[units.rows[units.starts[:-1]]]
        else:
            sizes = units.sums(lengths)
        steps = order_steps(
            sizes,
            self.layout.global_batch_size,
            self.seed,
            epoch,
            group_by_length=self.group_by_length and not self.regroups_rows,
            largest_first=self.group_by_length or self.regroups_rows,
        )
        return _Epoch(units, steps)

    def key_at(self, epoch: int, position: int) -> BatchKey:
        """The key of a micro-batch by its place in the epoch, from 0."""
        return BatchKey(epoch, *divmod(position, self.layout.accumulation))

    def largest_key(self, epoch: int) -> BatchKey:
        """The first of this device's micro-batches of an epoch that has the longest unit."""
        units, steps = self._epoch(epoch)
        sizes = units.sums(self.rows.lengths)
        firsts = [self.layout.rows_of(step, 0)[:1] for step in steps]  # longest first in a step
        longest = [int(sizes[first].sum()) for first in firsts]
        return BatchKey(epoch, int(np.argmax(longest)), 0)

    def keys(self, epoch: int) -> list[BatchKey]:
        """Every key of an epoch, in order; equally many in every epoch and on every device."""
        return [self.key_at(epoch, position) for position in range(len(self))]

    def __len__(self) -> int:
        num_whole, rest = divmod(self.num_units, self.layout.global_batch_size)
        return num_whole * self.layout.accumulation + self.layout.num_micro_batches(rest)

    def rows_of(self, key: BatchKey) -> list[np.ndarray]:
        """This device's rows of a micro-batch, unit by unit; none at the end of some epochs."""
        epoch = self._epoch(key.epoch)
        units = self.layout.rows_of(epoch.steps[key.step], key.micro_batch)
        return [epoch.units[unit] for unit in units.tolist()]

    def __getitem__(self, key: BatchKey | int) -> Batch:
        if isinstance(key, int):  # Lightning's overfit_batches replaces the sampler by a plain one
            if not 0 <= key < len(self):
                raise IndexError(key)
            key = self.key_at(0, key)
        units = self.rows_of(key)
        if self.shape.is_packed:
            return collate_packs(self.rows, units, self.pad_id, self.shape.width)
        row_ids = np.concatenate(units) if units else np.zeros(0, dtype=np.int64)
        return _lines(self.rows, row_ids, self.pad_id, self.shape)

    def __str__(self) -> str:
        """How full the packs are, or how many micro-batches a budget makes."""
        rows = epoch_rows(len(self.rows), self.multiplicity, self.seed, 0)
        lengths = self.rows.lengths[rows]
        if self.shape.is_packed:
            return describe_packing(lengths, self.num_units, self.shape.max_length or 0)
        unit = "rows" if self.shape.tokens_per_batch is None else "micro-batches"
        return f"{len(rows):,} rows in {self.num_units:,} {unit}"


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
        epoch = self.epoch
        for position in range(self.position, len(self.batches)):
            yield self.batches.key_at(epoch, position)

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
    """This device's share of a split in a fixed order, longest rows first; every row once.

    Args:
        rows: The split.
        layout: How rows are spread over devices and batches.
        pad_id: The id that fills short rows.
        shape: How wide batches are, and whether rows are pairs.
    """

    def __init__(
        self,
        rows: EncodedRows,
        layout: BatchLayout,
        pad_id: int,
        shape: BatchShape = BatchShape(),
    ) -> None:
        self.rows = rows
        self.layout = layout
        self.pad_id = pad_id
        self.shape = shape
        self._order = longest_first(np.arange(len(rows)), rows.lengths)

    def __len__(self) -> int:
        return self.layout.num_micro_batches(len(self.rows))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row_ids = self.layout.rows_of(self._order, index)
        return _lines(self.rows, row_ids, self.pad_id, self.shape)


def _lines(rows: EncodedRows, row_ids: np.ndarray, pad_id: int, shape: BatchShape) -> Batch:
    """A batch with a line for each row, or with two for each pair."""
    if shape.is_paired:
        return collate_pairs(rows, row_ids, pad_id)  # type: ignore[return-value]
    return collate(rows, row_ids, pad_id, shape.width)


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


def make_loader(
    batches: Any, workers: int, sampler: ResumableSampler | None = None
) -> DataLoader[Any]:
    """A loader of whole batches: by the keys of a sampler, or all in order.

    It draws from a generator of its own: every new iterator draws a seed, by default from the
    global generator, and a validation would then change the dropout that follows it.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=InOrderSampler(len(batches)) if sampler is None else sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )
