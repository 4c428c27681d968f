"""Micro-batches by a token budget, and rows that an epoch has more or less often than once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from test_batching import PAD, random_lengths, rows_of_lengths

from qlora_pl.batch import FILLER_ROW
from qlora_pl.data.batches.batching import BatchLayout, BatchShape, TrainingBatches
from qlora_pl.data.rows.encoded_rows import EncodedRows

# -- token budgets -------------------------------------------------------------------------------


def with_budget(
    rows: EncodedRows, layout: BatchLayout, budget: int = 256, **shape: Any
) -> TrainingBatches:
    shape = {"tokens_per_batch": budget, "max_length": 100} | shape
    return TrainingBatches(rows, layout, 5, True, PAD, BatchShape(**shape))


def test_a_token_budget_holds_and_every_row_is_there_once():
    """No batch could have taken the next row of its order; batches differ from epoch to epoch."""
    rows = rows_of_lengths(random_lengths(203))
    batches = with_budget(rows, BatchLayout(4, 3))
    seen = []
    for epoch in range(3):
        keys = batches.keys(epoch)
        assert len(keys) == len(batches)
        made = [batches[key] for key in keys]
        counted = Counter(row for batch in made for row in batch["row_ids"].tolist())
        assert counted == Counter(range(203))
        sizes = [batch["input_ids"].shape for batch in made]
        assert all(height * width <= 256 for height, width in sizes)
        assert sum((height + 1) * width <= 256 for height, width in sizes) < len(sizes) / 4
        seen.append({frozenset(batch["row_ids"].tolist()) for batch in made})
    assert len(seen[0] & seen[1]) < len(seen[0]) / 4


def test_with_a_budget_a_steps_rows_do_not_depend_on_the_devices():
    """Six micro-batches a step, cut in all four ways; the batch size means nothing."""
    rows = rows_of_lengths(random_lengths(150))

    def steps(accumulation: int, world_size: int, batch_size: int) -> list[list[int]]:
        devices = [
            with_budget(rows, BatchLayout(batch_size, accumulation, world_size, rank))
            for rank in range(world_size)
        ]
        found: list[list[int]] = []
        for key in devices[0].keys(1):
            if key.micro_batch == 0:
                found.append([])
            parts = [device[key]["row_ids"].tolist() for device in devices]
            found[-1] += [row for part in parts for row in part if row != FILLER_ROW]
        return found

    expected = steps(6, 1, 1)
    for accumulation, world_size in ((3, 2), (2, 3), (1, 6)):
        assert steps(accumulation, world_size, batch_size=7) == expected


def test_a_budget_counts_the_whole_width_where_all_batches_have_one():
    rows = rows_of_lengths(random_lengths(50))
    batches = with_budget(rows, BatchLayout(1), 512, pads_to_max_length=True)
    shapes = {tuple(batches[key]["input_ids"].shape) for key in batches.keys(0)}
    assert shapes == {(4, 104), (2, 104)}  # 512 // 104 rows; 50 leaves two


# -- how often a row is used ---------------------------------------------------------------------


def multiplicities() -> np.ndarray:
    """Ten rows twice, thirty once, twenty every other epoch, twelve 1.25 times, three never."""
    return np.repeat([2.0, 1.0, 0.5, 1.25, 0.0], [10, 30, 20, 12, 3])


def counts_of(batches: TrainingBatches, epoch: int, number: int) -> np.ndarray:
    rows = [row for key in batches.keys(epoch) for row in batches[key]["row_ids"].tolist()]
    return np.bincount(rows, minlength=number)


def test_a_row_is_used_as_often_as_its_multiplicity_says():
    """Over eight epochs: whole parts in each of them, the fraction of a group drawn anew."""
    multiplicity = multiplicities()
    rows = rows_of_lengths(random_lengths(75))
    batches = TrainingBatches(rows, BatchLayout(4, 2), 5, True, PAD, multiplicity=multiplicity)
    epochs = [counts_of(batches, epoch, 75) for epoch in range(8)]
    for counts in epochs:
        assert counts.sum() == 20 + 30 + 10 + 15
        assert (counts >= np.floor(multiplicity)).all()
        assert (counts <= np.ceil(multiplicity)).all()
        assert counts[40:60].sum() == 10
        assert counts[60:72].sum() == 15
    assert len({counts.tobytes() for counts in epochs}) == 8
    assert (np.sum(epochs, axis=0)[40:60] > 0).all()


@pytest.mark.parametrize(
    "shape",
    [BatchShape(is_packed=True, max_length=100), BatchShape(tokens_per_batch=256, max_length=100)],
    ids=["packs", "budget"],
)
def test_where_rows_are_regrouped_every_epoch_has_the_rows_of_the_first(shape: BatchShape):
    """Another half of the rows would be another number of steps."""
    rows = rows_of_lengths(random_lengths(75))
    batches = TrainingBatches(rows, BatchLayout(2, 2), 5, True, PAD, shape, multiplicities())
    first = counts_of(batches, 0, 75)
    assert first.sum() == 75
    assert first[:10].tolist() == [2] * 10
    for epoch in range(1, 4):
        assert counts_of(batches, epoch, 75).tolist() == first.tolist()
        assert len(batches.keys(epoch)) == len(batches)


# -- pinned ---------------------------------------------------------------------------------------


def test_the_packs_and_budgets_of_today_are_those_of_tomorrow():
    """Pinned by a run with numpy 2.4: a resumed run must find the rows where they were."""
    rows = rows_of_lengths([7, 3, 5, 4, 6, 2, 8, 1])
    packed = TrainingBatches(
        rows, BatchLayout(2), 7, True, PAD, BatchShape(is_packed=True, max_length=10)
    )
    assert [packed[key]["row_ids"].tolist() for key in packed.keys(1)] == PINNED_PACKS
    budget = TrainingBatches(
        rows, BatchLayout(1, 2), 7, True, PAD, BatchShape(tokens_per_batch=24, max_length=8)
    )
    assert [budget[key]["row_ids"].tolist() for key in budget.keys(1)] == PINNED_BUDGET


PINNED_PACKS = [[6, 5, 2, 7], [4, 3, 0, 1]]
PINNED_BUDGET = [[0, 6], [1, 4, 7], [5, 2, 3]]
