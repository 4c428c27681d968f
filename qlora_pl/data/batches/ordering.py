"""The order of an epoch: a pure function of (seed, epoch), which anyone can compute at any time.

An epoch is a permutation of units (rows, packs of rows, or whole micro-batches), cut into steps of
equally many. How many units and steps there are is the same in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qlora_pl.data.batches.packing import Ragged

STEPS_PER_LENGTH_GROUP = 50
"""Steps whose rows are sorted by length together (as transformers' LengthGroupedSampler)."""
WIDTH_MULTIPLE = 8
"""Widths of batches are multiples of it: tensor cores want that, and oneDNN keeps memory for every
width that it has seen (without it the quickstart grows from 1.8 to 2.6 GiB)."""
ORDER, MULTIPLICITY, COMPOSITION = 0, 1, 2
"""What an epoch's random numbers are for; each draws from a generator of its own."""


def keyed_generator(seed: int, stream: int, purpose: int = ORDER) -> np.random.Generator:
    """A generator of its own for each (seed, stream): epoch 7 needs no epochs 0 to 6 drawn first.

    Args:
        seed: Any integer; negative ones count back from 2**64.
        stream: From 0.
        purpose: What the numbers are for; other purposes draw others.
    """
    # uint64: numpy makes floats of a list that holds a large and a small number
    key = np.array([seed & (2**64 - 1), stream], dtype=np.uint64)
    counter = np.array([0, 0, 0, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def padded_width(length: int) -> int:
    """The width of a batch whose longest row has so many tokens."""
    return -(-length // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


@dataclass(frozen=True)
class Steps:
    """The units of each optimizer step of an epoch."""

    whole: np.ndarray
    """``(num_whole_steps, units_per_step)`` int64."""
    rest: np.ndarray
    """Units of the epoch's last step, where they are fewer; may be empty."""

    def __len__(self) -> int:
        return len(self.whole) + (len(self.rest) > 0)

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < len(self):
            raise IndexError(step)
        units: np.ndarray = self.whole[step] if step < len(self.whole) else self.rest
        return units

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[step] for step in range(len(self)))


def order_steps(
    lengths: np.ndarray,
    units_per_step: int,
    seed: int,
    epoch: int,
    *,
    group_by_length: bool,
    largest_first: bool,
) -> Steps:
    """Which units form each optimizer step of an epoch; every unit once.

    Args:
        lengths: ``(num_units,)`` tokens of each unit.
        units_per_step: The last step of an epoch may have fewer.
        seed: Of the run.
        epoch: From 0.
        group_by_length: The units of 50 steps at a time are sorted by length and cut into steps,
            whose order is then shuffled. False: units are only shuffled.
        largest_first: The first step of epoch 0 holds the longest unit, so that a run which does
            not fit into memory fails at once.

    Returns:
        The units of each step, longest first.
    """
    generator = keyed_generator(seed, epoch)
    order = generator.permutation(len(lengths))
    is_first = largest_first and epoch == 0 and len(order) > 0
    if is_first:
        # To the front, so that it is not among the units of the last, incomplete step.
        order = np.roll(order, -int(np.argmax(lengths[order])))
    num_whole = len(order) // units_per_step * units_per_step
    group = units_per_step * (STEPS_PER_LENGTH_GROUP if group_by_length else 1)
    whole = _sorted_groups(order[:num_whole], lengths, group).reshape(-1, units_per_step)
    if group_by_length:
        whole = whole[generator.permutation(len(whole))]
    if is_first and len(whole):
        largest = int(np.argmax(lengths[whole[:, 0]]))
        whole = np.concatenate([whole[largest : largest + 1], np.delete(whole, largest, axis=0)])
    return Steps(whole, longest_first(order[num_whole:], lengths))


def _sorted_groups(units: np.ndarray, lengths: np.ndarray, group: int) -> np.ndarray:
    """Units sorted by length, so many at a time."""
    num_whole = len(units) // group * group
    groups = units[:num_whole].reshape(-1, group)
    places = np.argsort(-lengths[groups], axis=1, kind="stable")
    whole = np.take_along_axis(groups, places, axis=1).ravel()
    return np.concatenate([whole, longest_first(units[num_whole:], lengths)])


def longest_first(units: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Units by length; those of one length stay in their order."""
    return units[np.argsort(-lengths[units], kind="stable")]


def epoch_steps(
    lengths: np.ndarray, global_batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> list[np.ndarray]:
    """Which rows form each optimizer step of an epoch, where a batch is padded; every row once.

    Args:
        lengths: ``(num_rows,)`` tokens of each row.
        global_batch_size: Rows of a step; the last step of an epoch may have fewer.
        seed: Of the run.
        epoch: From 0.
        group_by_length: See ``order_steps``; the longest row then is in the run's first step.

    Returns:
        One int64 array of row numbers for each step.
    """
    steps = order_steps(
        lengths,
        global_batch_size,
        seed,
        epoch,
        group_by_length=group_by_length,
        largest_first=group_by_length,
    )
    return list(steps)


def epoch_rows(num_rows: int, multiplicity: np.ndarray | None, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in the order of the file; equally many in every epoch.

    Rows of multiplicity m stand there m times on average: floor(m) times each, and for what is left
    a random part of them once more, drawn anew each epoch.

    Args:
        num_rows: Of the split.
        multiplicity: ``(num_rows,)`` how often an epoch has each row: 2 twice, 0.5 half of the rows
            that have this value; None: every row once.
        seed: Of the run.
        epoch: From 0.
    """
    if multiplicity is None:
        return np.arange(num_rows)
    copies = np.floor(multiplicity).astype(np.int64)
    generator = keyed_generator(seed, epoch, MULTIPLICITY)
    for value in np.unique(multiplicity):
        alike = np.flatnonzero(multiplicity == value)
        num_more = round(float(value) * len(alike)) - int(copies[alike].sum())
        copies[generator.choice(alike, num_more, replace=False, shuffle=False)] += 1
    return np.repeat(np.arange(num_rows), copies)


def fill_to_budget(
    lengths: np.ndarray, rows: np.ndarray, budget: int, generator: np.random.Generator
) -> Ragged:
    """Cut rows into micro-batches of at most so many tokens, padding included.

    Rows of one padded width are shuffled among themselves, and the widths follow each other from
    the longest on; so how many micro-batches there are depends on the lengths alone.

    Args:
        lengths: ``(num_rows,)`` tokens of each row of the split.
        rows: The rows to cut, by number.
        budget: Rows x width of a micro-batch at most; no row may be wider.
        generator: Decides which of the rows of one width go where.
    """
    widths = -(-lengths // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    order = longest_first(rows[generator.permutation(len(rows))], widths)
    sorted_widths = widths[order].tolist()
    starts = [0]
    while starts[-1] < len(order):
        starts.append(min(starts[-1] + budget // sorted_widths[starts[-1]], len(order)))
    return Ragged(order, np.array(starts, dtype=np.int64))
