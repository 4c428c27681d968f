"""What two checkpoints, two histories and two adapters are said to differ in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qlora_pl.proof.comparison import (
    Comparison,
    Difference,
    compare_checkpoints,
    compare_rows,
    compare_tensors,
    is_measured,
)
from qlora_pl.proof.cut import CutRun
from qlora_pl.proof.experiment import stopping_step
from qlora_pl.proof.verdict import Interruption, judge


def checkpoint() -> dict[str, Any]:
    """The parts of a checkpoint, each as small as can be."""
    return {
        "boundary": {"step": 3, "epoch": 0, "position": 12},
        "data": {"train_rows": "87a3"},
        "random_states": [{"torch": torch.zeros(8, dtype=torch.uint8), "python": [1, 2, 3]}],
        "lr_schedulers": [{"last_epoch": 3}],
        "optimizer_states": [{"state": {"q.lora_A": {"state1": torch.zeros(4), "step": 3}}}],
        "state_dict": {"q.lora_A": torch.ones(2, 2)},
        "loops": {"fit_loop": {"ready": 3}},
        "callbacks": {"RunMetrics": {"totals": {"seconds": 1.5, "rows": 12.0}}},
        "note": "as it was",
    }


CHANGES: dict[str, Any] = {
    "position: position": lambda c: c["boundary"].update(position=13),
    "data: train_rows": lambda c: c["data"].update(train_rows="0000"),
    "random state: rank 0 (torch)": lambda c: c["random_states"][0]["torch"].add_(1),
    "random state: rank 0 (python)": lambda c: c["random_states"][0].update(python=[1, 2, 4]),
    "schedule: 0.last_epoch": lambda c: c["lr_schedulers"][0].update(last_epoch=4),
    "optimizer state: q.lora_A (state1)": lambda c: c["optimizer_states"][0]["state"]["q.lora_A"][
        "state1"
    ].add_(0.5),
    "adapter: q.lora_A": lambda c: c["state_dict"]["q.lora_A"].mul_(1.5),
    "loop counter: fit_loop.ready": lambda c: c["loops"]["fit_loop"].update(ready=4),
    "callbacks: RunMetrics.totals.rows": lambda c: c["callbacks"]["RunMetrics"]["totals"].update(
        rows=13.0
    ),
    "note: note": lambda c: c.update(note="otherwise"),
}


def test_a_checkpoint_equals_its_copy() -> None:
    assert compare_checkpoints(checkpoint(), copy.deepcopy(checkpoint()), 3) == []


@pytest.mark.parametrize("named", CHANGES)
def test_a_changed_part_is_named(named: str) -> None:
    other = checkpoint()
    CHANGES[named](other)
    [found] = compare_checkpoints(checkpoint(), other, 3)
    assert f"{found.part}: {found.name}" == named
    assert found.step == 3


@pytest.mark.parametrize("part", ["boundary", "optimizer_states", "note"])
def test_a_part_that_only_one_has_is_named(part: str) -> None:
    other = checkpoint()
    del other[part]
    assert compare_checkpoints(checkpoint(), other, 3)
    assert compare_checkpoints(other, checkpoint(), 3)


def test_how_far_numbers_lie_apart_is_said() -> None:
    other = checkpoint()
    other["state_dict"]["q.lora_A"][1, 1] -= 0.25
    [found] = compare_checkpoints(checkpoint(), other, 3)
    assert found.largest == 0.25
    assert "by up to 0.25" in found.sentence()


def test_a_number_that_is_none_is_infinitely_far_from_one() -> None:
    [found] = compare_tensors({"a": torch.ones(2)}, {"a": torch.tensor([1.0, float("nan")])}, 4)
    assert found.largest == float("inf")
    nan = {"a": torch.tensor([float("nan")])}
    assert compare_tensors(nan, copy.deepcopy(nan), 4) == []  # the same bytes


@pytest.mark.parametrize(
    "other", [torch.zeros(4), torch.ones(4, dtype=torch.float64), torch.ones(2, 2)]
)
def test_tensors_of_another_sign_type_or_shape_differ(other: torch.Tensor) -> None:
    assert compare_tensors({"a": torch.ones(4)}, {"a": other}, 4)
    assert compare_tensors({"a": torch.zeros(4)}, {"a": -torch.zeros(4)}, 4)


def test_time_and_memory_are_not_compared() -> None:
    other = checkpoint()
    other["callbacks"]["RunMetrics"]["totals"]["seconds"] = 99.0
    assert compare_checkpoints(checkpoint(), other, 3) == []
    for name in ("RunMetrics.runtime_seconds", "throughput/tokens_per_second", "memory/peak"):
        assert is_measured(name)
    for name in ("train/loss", "throughput/padding_ratio", "q.lora_A", "RunMetrics.last.val/loss"):
        assert not is_measured(name)


def row(step: int, loss: str) -> dict[str, str]:
    return {"step": str(step), "train/loss": loss, "throughput/tokens_per_second": f"{step}{loss}"}


def test_the_step_whose_row_differs_is_named() -> None:
    rows = [row(1, "2.5"), row(2, "2.25"), row(3, "2.0")]
    assert list(compare_rows(rows, rows)) == []
    [found] = compare_rows(rows, [*rows[:2], row(3, "2.5")])
    assert (found.step, found.name, found.largest) == (3, "train/loss", 0.5)


@pytest.mark.parametrize("kept", [[0, 2], [0, 1], [1, 2], []])
def test_a_step_that_only_one_history_has_is_named(kept: list[int]) -> None:
    rows = [row(1, "2.5"), row(2, "2.25"), row(3, "2.0")]
    missing = next(place for place in range(3) if kept[place : place + 1] != [place]) + 1
    [found] = compare_rows(rows, [rows[place] for place in kept])
    assert (found.step, found.name) == (missing, "the row itself")
    [found] = compare_rows([rows[place] for place in kept], rows)
    assert found.name == "the row itself"


# -- where to stop, and what to make of it ---------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "step"),
    [
        ([0.25, 0.5, 0.75, 1.0], 2),
        ([0.5, 1.0, 1.5, 2.0], 1),
        ([0.8, 1.0, 1.8, 2.0], 1),
        ([1.0, 2.0, 3.0, 4.0], 2),  # no step lies inside an epoch
        ([0.0, 0.0, 0.0, 0.0], 2),  # a stream has no length to be a part of
        ([1.0, 1.5], 1),
    ],
)
def test_the_run_is_killed_inside_an_epoch_and_near_its_middle(
    epochs: list[float], step: int
) -> None:
    assert stopping_step(dict(enumerate(epochs, start=1)), len(epochs)) == step


CUT = CutRun(words=(), name="x", steps=4, learning_rate=2.0e-4, is_deterministic=False)
KILLED = Interruption(2, True)
FINAL = {"step": 4, "part": "final adapter", "name": "q.lora_A"}


def comparison(*differences: Difference) -> Comparison:
    return Comparison(
        differences=differences,
        num_adapter_tensors=28,
        num_checkpoint_values=300,
        num_rows=5,
        steps=(2, 3, 4),
    )


def final(largest: float) -> Difference:
    return Difference(**FINAL, largest=largest)  # type: ignore[arg-type]


def test_equal_bytes_are_a_proof() -> None:
    verdict = judge(comparison(), comparison(), CUT, KILLED)
    assert (verdict.kind, verdict.is_good) == ("proven", True)


def test_one_different_weight_is_none() -> None:
    verdict = judge(comparison(), comparison(final(1.0e-4)), CUT, KILLED)
    assert (verdict.kind, verdict.is_good) == ("not proven", False)
    assert "'q.lora_A' of the final adapter" in verdict.sentence
    assert "0.5 learning rates" in verdict.sentence


def test_a_run_that_is_not_repeatable_is_judged_by_how_far_two_of_it_lie_apart() -> None:
    near = judge(comparison(final(2.0e-5)), comparison(final(4.0e-5)), CUT, KILLED)
    assert (near.kind, near.is_good, near.is_repeatable) == ("within noise", True, False)
    assert "bytes cannot be compared" in near.sentence
    far = judge(comparison(final(2.0e-5)), comparison(final(2.0e-4)), CUT, KILLED)
    assert (far.kind, far.is_good) == ("not proven", False)


@pytest.mark.parametrize("part", ["position", "random state", "schedule", "loop counter", "data"])
def test_noise_excuses_no_other_position_random_state_or_schedule(part: str) -> None:
    other = Difference(step=3, part=part, name="it")
    verdict = judge(comparison(final(2.0e-5)), comparison(other, final(2.0e-5)), CUT, KILLED)
    assert verdict.kind == "not proven"
    assert f"the {part} of 'it'" in verdict.sentence


def test_determinism_is_advised_where_it_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_pl.proof.verdict.uses_cuda", lambda: True)
    verdict = judge(comparison(final(2.0e-5)), comparison(final(2.0e-5)), CUT, KILLED)
    assert "trainer.deterministic: true" in verdict.sentence
