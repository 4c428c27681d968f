"""Which rows form which step, on any layout, and the tensors that they become."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Iterable
from itertools import product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from qlora_pl.batch import FILLER_ROW, IGNORE_INDEX, Batch, PromptBatch
from qlora_pl.data.batches.batching import (
    BatchKey,
    BatchLayout,
    BatchShape,
    EvaluationBatches,
    InOrderSampler,
    PromptBatches,
    ResumableSampler,
    TrainingBatches,
)
from qlora_pl.data.batches.collation import collate, collate_prompts
from qlora_pl.data.batches.ordering import STEPS_PER_LENGTH_GROUP, epoch_steps
from qlora_pl.data.encoding.example import EncodedExample
from qlora_pl.data.rows.encoded_rows import EncodedRows

PAD = 0


def rows_of_lengths(lengths: Iterable[int]) -> EncodedRows:
    """Rows whose every id is their own number, so that a batch shows what it holds."""
    examples = []
    for number, length in enumerate(lengths):
        is_trained = np.arange(length) >= length // 2
        ids = np.full(length, number, dtype=np.int32)
        examples.append(EncodedExample(ids, is_trained, is_trained))
    return EncodedRows.from_examples(examples)


def random_lengths(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 100, number)


def layouts(global_batch_size: int) -> list[tuple[int, int, int]]:
    """Every (batch size, accumulation, devices) with this product."""
    sizes = range(1, global_batch_size + 1)
    return [(b, a, w) for b, a, w in product(sizes, repeat=3) if b * a * w == global_batch_size]


def step_rows(
    rows: EncodedRows, layout: tuple[int, int, int], epoch: int, seed: int = 5, grouped: bool = True
) -> list[list[list[int]]]:
    """For each step and each of its micro-batches, the rows on all devices together."""
    batch_size, accumulation, world_size = layout
    devices = [
        TrainingBatches(
            rows, BatchLayout(batch_size, accumulation, world_size, rank), seed, grouped, PAD
        )
        for rank in range(world_size)
    ]
    keys = devices[0].keys(epoch)
    assert all(device.keys(epoch) == keys for device in devices)
    steps: list[list[list[int]]] = []
    for key in keys:
        if key.micro_batch == 0:
            steps.append([])
        shares = [device[key]["row_ids"].tolist() for device in devices]
        assert all(len(share) <= batch_size for share in shares)
        steps[-1].append([row for share in shares for row in share if row != FILLER_ROW])
    return steps


# -- the order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_has_every_row_once(grouped: bool):
    chosen = random.Random(1)
    for _ in range(200):
        number, size = chosen.randint(1, 700), chosen.randint(1, 40)
        lengths = random_lengths(number, seed=number)
        steps = epoch_steps(lengths, size, chosen.randint(0, 99), chosen.randint(0, 3), grouped)
        assert sorted(np.concatenate(steps).tolist()) == list(range(number))
        assert [len(step) for step in steps[:-1]] == [size] * (len(steps) - 1)
        assert len(steps) == -(-number // size)


@pytest.mark.parametrize("grouped", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch_alone(grouped: bool):
    lengths = random_lengths(100)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [step.tolist() for step in epoch_steps(lengths, 4, seed, epoch, grouped)]

    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    first = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    np.random.seed(2)
    torch.manual_seed(2)
    random.seed(2)
    for (seed, epoch), steps in reversed(first.items()):
        assert order(seed, epoch) == steps
    assert len({str(steps) for steps in first.values()}) == 9


def test_every_seed_has_an_order_of_its_own():
    """Negative and very large ones too, without a warning."""
    lengths = random_lengths(50)
    seeds = [0, 1, -1, -2, 2**31, 2**63 - 1, 2**63, 2**64 - 3]
    orders = {str([s.tolist() for s in epoch_steps(lengths, 4, n, 0, False)]) for n in seeds}
    assert len(orders) == len(seeds)


def test_the_order_of_today_is_the_order_of_tomorrow():
    """Pinned by a run with numpy 2.4: a resumed run must find the rows where they were.

    Should numpy change what ``permutation`` draws, runs from before cannot be resumed after.
    """
    steps = epoch_steps(np.ones(12, int), 4, seed=7, epoch=1, group_by_length=False)
    assert [step.tolist() for step in steps] == PINNED
    steps = epoch_steps(np.arange(1, 13), 3, seed=7, epoch=0, group_by_length=True)
    assert [step.tolist() for step in steps] == PINNED_GROUPED


PINNED = [[1, 8, 5, 2], [9, 11, 0, 4], [3, 7, 10, 6]]
PINNED_GROUPED = [[11, 10, 9], [2, 1, 0], [5, 4, 3], [8, 7, 6]]


@pytest.mark.parametrize("number", [1, 3, 10, 11, 37, 203])
def test_the_first_step_of_a_run_holds_the_longest_row(number: int):
    """Wherever the longest row lies, the incomplete last step of the epoch included."""
    for seed in range(20):
        lengths = random_lengths(number, seed)
        lengths[seed % number] = 1000
        steps = epoch_steps(lengths, 4, seed, 0, True)
        assert seed % number in steps[0]
        assert sorted(np.concatenate(steps).tolist()) == list(range(number))


def test_rows_of_a_step_are_sorted_longest_first():
    lengths = random_lengths(203)
    for grouped in (True, False):
        for step in epoch_steps(lengths, 8, 0, 2, grouped):
            assert (np.diff(lengths[step]) <= 0).all()


def test_grouping_by_length_pads_less():
    """Counted in tokens, over 1000 rows of uniformly distributed lengths in micro-batches of 4."""
    lengths = random_lengths(1000)

    def padding(grouped: bool) -> float:
        steps = epoch_steps(lengths, 16, 0, 1, grouped)
        micro_batches = [step[i : i + 4] for step in steps for i in range(0, len(step), 4)]
        computed = sum(len(rows) * lengths[rows].max() for rows in micro_batches)
        return 1 - lengths.sum() / computed

    assert padding(True) < 0.02
    assert padding(False) > 0.08


def test_grouping_leaves_the_order_of_lengths_random():
    """A run that saw its rows from long to short would be another experiment."""
    lengths = random_lengths(4000)
    longest = [lengths[step].max() for step in epoch_steps(lengths, 16, 0, 1, True)]
    assert len(longest) > 2 * STEPS_PER_LENGTH_GROUP
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.2


# -- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("number", [5, 24, 47])
def test_the_rows_of_a_step_do_not_depend_on_the_layout(number: int, grouped: bool):
    """Twelve rows a step, cut in all 18 ways; and every row is there once an epoch."""
    rows = rows_of_lengths(random_lengths(number))
    for epoch in (0, 1):
        expected = [
            step.tolist()
            for step in epoch_steps(rows.lengths, 12, 5, epoch, group_by_length=grouped)
        ]
        assert Counter(row for step in expected for row in step) == Counter(range(number))
        assert len(layouts(12)) == 18
        for layout in layouts(12):
            steps = step_rows(rows, layout, epoch, grouped=grouped)
            assert [[r for part in step for r in part] for step in steps] == expected
            assert [len(step) for step in steps[:-1]] == [layout[1]] * (len(steps) - 1)


def test_a_device_without_rows_gets_a_filler_that_teaches_nothing():
    """Five rows on four devices of two: the third has one row, the fourth none."""
    rows = rows_of_lengths([9, 8, 7, 6, 5])
    shares = [
        TrainingBatches(rows, BatchLayout(2, 1, 4, rank), 0, True, PAD)[BatchKey(0, 0, 0)]
        for rank in range(4)
    ]
    assert [share["row_ids"].tolist() for share in shares] == [[0, 1], [2, 3], [4], [FILLER_ROW]]
    filler = shares[3]
    assert filler["input_ids"].tolist() == [[PAD] * 8]
    assert filler["attention_mask"].tolist() == [[1] + [0] * 7]  # one, or attention gives NaN
    assert filler["labels"].tolist() == [[IGNORE_INDEX] * 8]


@pytest.mark.parametrize("number", [1, 2, 7, 24])
def test_evaluation_sees_every_row_once_on_any_layout(number: int):
    rows = rows_of_lengths(random_lengths(number))
    for batch_size, world_size in product((1, 2, 3, 8), (1, 2, 3, 4)):
        devices = [
            EvaluationBatches(rows, BatchLayout(batch_size, 1, world_size, rank), PAD)
            for rank in range(world_size)
        ]
        assert len({len(device) for device in devices}) == 1  # devices wait for each other
        batches = [device[i] for device in devices for i in range(len(device))]
        seen = Counter(row for batch in batches for row in batch["row_ids"].tolist())
        seen.pop(FILLER_ROW, None)
        assert seen == Counter(range(number))
        trained = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        assert trained == int(rows.is_trained.sum())
        with pytest.raises(IndexError):
            devices[0][len(devices[0])]


@pytest.mark.parametrize("number", [1, 2, 7, 24])
def test_prediction_answers_every_prompt_once_in_the_order_of_the_file(number: int):
    prompts = [(f"prompt {n}", [5] * (n + 1)) for n in range(number)]
    references = [f"answer {n}" for n in range(number)]
    for batch_size, world_size in product((1, 2, 3, 8), (1, 2, 3, 4)):
        devices = [
            PromptBatches(prompts, references, BatchLayout(batch_size, 1, world_size, rank), PAD)
            for rank in range(world_size)
        ]
        found: dict[int, tuple[str, str]] = {}
        in_order = []
        for index in range(len(devices[0])):
            for device in devices:
                batch = device[index]
                ids = batch["row_ids"].tolist()
                in_order += ids
                found |= dict(
                    zip(ids, zip(batch["prompts"], batch["references"], strict=True), strict=True)
                )
        assert in_order == list(range(number))
        assert found == {n: (f"prompt {n}", f"answer {n}") for n in range(number)}


# -- tensors -------------------------------------------------------------------------------------


def test_rows_are_padded_on_the_right_and_masked_by_length():
    """By hand; the first row holds the padding id as a token, which stays a token."""
    rows = EncodedRows(
        np.array([4, PAD, PAD, 7, 8], np.int32),
        np.array([0, 0, 1, 0, 1], bool),
        np.array([0, 3]),
        np.array([3, 2]),
        np.array([1, 1]),
    )
    batch = collate(rows, np.array([1, 0]), PAD)
    assert batch["input_ids"].tolist() == [[7, 8, *[PAD] * 6], [4, *[PAD] * 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, *[0] * 6], [1, 1, 1, *[0] * 5]]
    assert batch["labels"].tolist() == [[-100, 8, *[-100] * 6], [-100, -100, PAD, *[-100] * 5]]
    assert batch["row_ids"].tolist() == [1, 0]
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    assert [tensor.dtype for tensor in tensors] == [torch.int64] * 4
    assert set(batch) == {"input_ids", "attention_mask", "labels", "row_ids"}


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([("a", [5]), ("b", [6, 7, 8])], ["x", ""], np.array([3, 4]), PAD)
    assert batch["input_ids"].tolist() == [[PAD, PAD, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch["row_ids"].tolist() == [3, 4]
    assert (batch["prompts"], batch["references"]) == (["a", "b"], ["x", ""])
    assert set(batch) == set(PromptBatch.__annotations__)


def test_a_batch_is_as_wide_as_its_longest_row_rounded_up_to_8():
    rows = rows_of_lengths(random_lengths(40))
    batches = TrainingBatches(rows, BatchLayout(4, 2), 0, True, PAD)
    for key in batches.keys(0):
        batch = batches[key]
        row_ids = batch["row_ids"].tolist()
        width = batch["input_ids"].shape[1]
        assert width % 8 == 0
        assert 0 <= width - max(rows.lengths[row_ids]) < 8
        assert batch["attention_mask"].sum(1).tolist() == rows.lengths[row_ids].tolist()
        for place, row in enumerate(row_ids):
            assert batch["input_ids"][place, : rows.lengths[row]].eq(row).all()


def test_a_loader_knows_its_length_without_listing_its_keys(monkeypatch: pytest.MonkeyPatch):
    """A million rows: neither length nor sampler makes a list of them, or the order of an epoch."""
    ones = np.ones(10**6, np.int64)
    rows = EncodedRows(np.zeros(10**6, np.int32), ones.astype(bool), np.arange(10**6), ones, ones)
    monkeypatch.setattr(TrainingBatches, "keys", lambda *_: pytest.fail("listed"))
    batches = TrainingBatches(rows, BatchLayout(3, 4, 2), 5, True, PAD)
    assert len(ResumableSampler(batches)) == len(batches) == -(-(10**6) // 6)
    assert next(iter(ResumableSampler(batches, 2, 4 * 7 + 3))) == BatchKey(2, 7, 3)
    assert batches._epoch.cache_info().currsize == 0


# -- loaders -------------------------------------------------------------------------------------


def loaded(batches: TrainingBatches, epoch: int, position: int, num_workers: int) -> list[Batch]:
    sampler = ResumableSampler(batches, epoch, position)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    found = list(loader)
    sampler.set_epoch(epoch + 1)
    return found + list(loader)


@pytest.mark.parametrize(
    "shape",
    [
        BatchShape(),
        BatchShape(is_packed=True, max_length=128),
        BatchShape(tokens_per_batch=256, max_length=100),
    ],
    ids=["rows", "packs", "budget"],
)
def test_workers_change_nothing(shape: BatchShape):
    rows = rows_of_lengths(random_lengths(45))
    batches = TrainingBatches(rows, BatchLayout(2, 2), 3, True, PAD, shape)
    for alone, with_workers in zip(loaded(batches, 1, 5, 0), loaded(batches, 1, 5, 2), strict=True):
        assert all(torch.equal(alone[name], with_workers[name]) for name in alone)


def test_what_travels_to_a_worker_gives_the_same_batches():
    rows = rows_of_lengths(random_lengths(20))
    batches = TrainingBatches(rows, BatchLayout(2, 2), 3, True, PAD)
    batches.keys(0)
    copy = pickle.loads(pickle.dumps(batches))
    assert copy.keys(4) == batches.keys(4)
    for key in batches.keys(4):
        assert torch.equal(copy[key]["row_ids"], batches[key]["row_ids"])


@pytest.mark.parametrize("position", [0, 1, 7, 11, 12])
def test_a_resumed_epoch_goes_on_where_it_stopped_and_the_next_is_whole(position: int):
    batches = TrainingBatches(rows_of_lengths(random_lengths(45)), BatchLayout(4, 1), 3, True, PAD)
    sampler = ResumableSampler(batches, epoch=2, position=position)
    sampler.set_epoch(2)
    assert list(sampler) == batches.keys(2)[position:]
    assert len(sampler) == 12  # Lightning counts the skipped part itself
    sampler.set_epoch(3)
    assert list(sampler) == batches.keys(3)
    assert len(batches.keys(3)) == 12


def test_a_plain_index_counts_through_the_first_epoch():
    """What Lightning's overfit_batches asks for."""
    batches = TrainingBatches(rows_of_lengths(random_lengths(9)), BatchLayout(2), 3, True, PAD)
    keys = batches.keys(0)
    for index in range(len(batches)):
        assert torch.equal(batches[index]["row_ids"], batches[keys[index]]["row_ids"])
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_an_evaluation_sampler_counts_up():
    assert list(InOrderSampler(4)) == [0, 1, 2, 3]
    assert len(InOrderSampler(4)) == 4
