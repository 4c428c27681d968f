"""Drawn rows: lengths as data sets have them, the same for every program, and enough of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.benching.rows import (
    MEDIAN_AND_SPREAD,
    draw_rows,
    row_lengths,
    rows_of_steps,
    training_batches,
)
from qlora_pl.benching.settings import Workload


def workload(**changes: Any) -> Workload:
    return Workload(**{"shape": "tiny", "tokens_per_micro": 1024, "seq": 256} | changes)


@pytest.mark.parametrize("name", MEDIAN_AND_SPREAD)
def test_lengths_are_those_of_the_data_set(name: Any) -> None:
    """Median and spread of 20,000 lognormal draws, whose own errors are under 2 %."""
    lengths = row_lengths(workload(lengths=name, seq=10**6, tokens_per_micro=10**6), 20_000)
    median, spread = MEDIAN_AND_SPREAD[name]
    assert np.median(lengths) == pytest.approx(median, rel=0.03)
    assert np.log(lengths).std() == pytest.approx(spread, rel=0.03)


def test_no_row_is_longer_than_a_line_and_fixed_ones_fill_it() -> None:
    assert row_lengths(workload(lengths="chat"), 500).max() == 256
    assert set(row_lengths(workload(lengths="fixed"), 9)) == {256}


def test_the_first_third_of_a_row_is_not_trained_on_and_ids_are_ordinary() -> None:
    rows = draw_rows(workload(), 512, 4)
    assert rows.input_ids.min() >= 3
    assert rows.input_ids.max() == 511
    for number in range(20):
        ids, labels = rows[number]
        is_trained = labels != IGNORE_INDEX
        assert not is_trained[: int(0.3 * len(ids))].any()
        assert is_trained[-1]
        assert is_trained.sum() == rows.num_trained[number]
        assert 0.5 < is_trained.mean() <= 0.7


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    first, again = (draw_rows(workload(seed=3), 512, 4) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != draw_rows(workload(seed=4), 512, 4).fingerprint()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", ["alpaca", "oasst", "chat", "fixed"])
def test_every_step_is_whole(packing: bool, lengths: Any) -> None:
    """Each has all its micro-batches with all their lines; packed ones are nearly full.

    A single pack is what was left over at the end, as in any epoch.
    """
    tokens = 0
    chosen = workload(packing=packing, lengths=lengths, accumulation=2)
    batches = training_batches(draw_rows(chosen, 512, 6), chosen)
    for position in range(12):
        batch = batches[batches.key_at(0, position)]
        assert len(batch["input_ids"]) == chosen.lines == 4
        if packing:
            tokens += int(batch["document_lengths"].sum())
    if packing:
        assert tokens > 0.9 * 12 * 4 * 256


def test_the_rows_of_a_step_are_those_of_its_batches() -> None:
    chosen = workload(accumulation=2)
    batches = training_batches(draw_rows(chosen, 512, 4), chosen)
    steps = rows_of_steps(batches, 3)
    for number, rows in enumerate(steps):
        expected = [
            row
            for part in range(2)
            for row in batches[batches.key_at(0, 2 * number + part)]["row_ids"].tolist()
        ]
        assert sorted(rows) == sorted(expected)
