"""What is made of seconds and tokens, against arithmetic by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qlora_pl.benching.advice import InUse, advice
from qlora_pl.benching.against import OWN, comparison, comparison_report
from qlora_pl.benching.clock import StepClock, summary
from qlora_pl.benching.figures import (
    StepContent,
    hardware_operations,
    loss_problem,
    throughput,
    utilisation,
)
from qlora_pl.benching.prediction import card_of_device
from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.modeling.compute import ComputeCost

STEP = StepContent(tokens=80, trained_tokens=50, padded_tokens=100, rows=4, token_pairs=2000)
COST = ComputeCost(matrices=1000, head=10, adapters=100, attention=7)


def test_rates_are_tokens_over_all_seconds_and_repeats_have_rates_of_their_own() -> None:
    found = throughput([1.0, 1.0, 2.0, 2.0], [STEP] * 4, repeats=2)
    assert found["tokens_per_second"] == pytest.approx(320 / 6)
    assert found["trained_tokens_per_second"] == pytest.approx(200 / 6)
    assert found["padded_tokens_per_second"] == pytest.approx(400 / 6)
    assert found["samples_per_second"] == pytest.approx(16 / 6)
    assert found["padding_ratio"] == pytest.approx(0.2)
    assert found["tokens_per_second_of_repeats"] == [80.0, 40.0]
    assert found["spread_of_repeats"] == 2.0


def test_median_and_90th_percentile_are_of_steps_that_were_taken() -> None:
    found = summary([float(number) for number in range(1, 11)])
    assert found == {"median": 5.5, "p90": 9.0, "least": 1.0, "most": 10.0}
    assert summary([3.0])["p90"] == 3.0


def test_a_frozen_weight_costs_four_operations_a_token_and_six_with_recomputation() -> None:
    """Not the 6 and 8 of full fine-tuning: there is no gradient of the weight itself."""
    plain = ComputeCost(matrices=1000, head=0, adapters=0, attention=0)
    full = StepContent(100, 100, 100, 1, 0)
    assert hardware_operations(plain, full, recomputes=False) == 4 * 1000 * 100
    assert hardware_operations(plain, full, recomputes=True) == 6 * 1000 * 100


def test_hfu_counts_padding_and_recomputation_and_mfu_neither() -> None:
    """By hand: products, the head over trained tokens, three (four) passes of attention."""
    useful = 80 * (4 * 1000 + 6 * 100) + 4 * 50 * 10 + 3 * 2 * 7 * 2000
    done = 100 * (6 * 1000 + 8 * 100) + 4 * 50 * 10 + 4 * 2 * 7 * 2000
    found = utilisation(COST, [2.0], [STEP], True, measured_peak=1e6, sheet_peak=2e6)
    assert found["mfu"] == pytest.approx(useful / 2 / 1e6)
    assert found["hfu"] == pytest.approx(done / 2 / 1e6)
    assert found["mfu_of_data_sheet"] == pytest.approx(found["mfu"] / 2)
    assert "4 for each frozen weight" in found["definition"]


@pytest.mark.parametrize("loss", [math.log(512) - 0.6, math.log(512) + 0.6, math.nan, math.inf])
def test_a_first_loss_far_from_guessing_is_a_problem(loss: float) -> None:
    assert loss_problem(math.log(512) + 0.2, 512) is None
    assert "does not compute" in str(loss_problem(loss, 512))


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100-40GB"),  # both sizes have the same rate
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100-16GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA L4", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_card_is_known_by_what_its_driver_calls_it(name: str, card: str | None) -> None:
    found = card_of_device(name)
    assert (None if found is None else found.name) == card


def test_the_clock_leaves_warm_up_and_profiled_steps_out() -> None:
    clock = StepClock(Timing(warmup=2, steps=3, repeats=2, profiled=1), torch.device("cpu"))
    clock.begin()
    numbers = [clock.end_step() for _ in range(9)]
    assert numbers == list(range(1, 10))
    assert clock.is_done
    assert len(clock.seconds()) == 6
    assert clock.peak["resident"] > 0
    assert clock.peak_of_first["resident"] > 0


PARTS = dict.fromkeys(
    ("data", "communication", "idle", "optimizer", "dequantisation", "attention", "loss"), 0.0
)


def advised(
    use: InUse | None = None, reserved: int = 90, padding: float = 0.0, **parts: float
) -> str:
    """Advice on a step of such parts; the rest of it is element-wise work and products."""
    shares = PARTS | {"element-wise": 0.1, "GEMM": 0.0} | parts
    record = {
        "speed": {"padding_ratio": padding},
        "parts": {"shares": shares},
        "compute": {"hfu": 0.5},
        "memory": {"of_timed_steps": {"reserved": reserved, "card": 100}},
    }
    return advice(record, use or InUse(kind="cuda", recomputes=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"padding": 0.4}, "data.packing"),
        ({"data": 0.2}, "set data.num_workers to 1 or more"),
        ({"communication": 0.4}, "accumulate_grad_batches"),
        ({"idle": 0.5}, "larger micro-batches"),
        ({"optimizer": 0.3}, "model.optimizer.name: adamw_torch"),
        ({"dequantisation": 0.3}, "decodes weights"),
        ({"attention": 0.6}, "data.max_length, or model.attn_implementation: flash_attention_2"),
        ({"GEMM": 0.9}, "GEMM (90%)"),
        ({"GEMM": 0.9, "reserved": 10}, "gradient_checkpointing: false"),
    ],
    ids=str,
)
def test_the_advice_follows_from_the_largest_loss(changes: Any, words: str) -> None:
    assert words in advised(**changes)


def test_of_two_losses_the_one_further_above_its_usual_share_is_told() -> None:
    """Usual are 5 % of data and 25 % of idling."""
    assert "waits for rows" in advised(data=0.3, idle=0.4)
    assert "larger micro-batches" in advised(data=0.1, idle=0.6)


@pytest.mark.parametrize(
    ("use", "changes", "words", "never"),
    [
        ({"window": 100}, {"data": 0.2}, "data.window: null", "num_workers"),
        ({"num_workers": 2}, {"data": 0.2}, "raise data.num_workers above 2", "set data."),
        ({"optimizer": "adamw_torch"}, {"optimizer": 0.3}, "a lower model.lora.r", "adamw_torch"),
        ({"is_packed": True}, {"padding": 0.4, "GEMM": 0.9}, "GEMM (90%)", "packing"),
        ({"kind": "cpu"}, {"attention": 0.6}, "a shorter data.max_length", "flash"),
        ({"attention": "eager"}, {"attention": 0.6}, "attn_implementation: sdpa", "flash"),
        ({"dropout": 0.1}, {"element-wise": 0.6}, "model.lora.dropout: 0", "bfloat16"),
        ({"dtype": "float32"}, {"element-wise": 0.6}, "compute_dtype: bfloat16", "dropout"),
        ({}, {"element-wise": 0.6}, "largest part of a step is element-wise", "set "),
        ({"kind": "cpu", "dtype": "float32"}, {"element-wise": 0.6}, "largest part", "bfloat16"),
        ({"kind": "cpu"}, {"idle": 0.6}, "Python and waiting", "GPU"),
    ],
    ids=str,
)
def test_nothing_is_advised_that_is_set_already_or_cannot_be(
    use: Any, changes: Any, words: str, never: str
) -> None:
    said = advised(InUse(**({"kind": "cuda"} | use)), **changes)
    assert words in said
    assert never not in said


def test_without_a_profile_only_padding_is_advised_on() -> None:
    record = {"speed": {"padding_ratio": 0.4}, "parts": None}
    assert "data.packing" in advice(record, InUse())
    assert "--profiled 0" in advice(record, InUse(is_packed=True))


def turn(rate: float, losses: list[float] | None = None, tokens: int = 100) -> dict[str, Any]:
    return {
        "tokens_per_second": rate,
        "step_seconds": {"median": 100 / rate},
        "tokens_of_steps": [tokens],
        "losses": losses or [6.2, 6.1],
        "peak": {"resident": 10**9},
        "environment": {"device": "a device", "date": "a date"},
    }


def reported(found: dict[str, Any]) -> str:
    timing = {"follows_protocol": True}
    return comparison_report(
        found | {"workload": Workload(shape="tiny").to_plain(), "timing": timing}
    )


def test_a_ratio_is_that_of_medians_with_the_own_turns_beside_it() -> None:
    found = comparison([turn(100), turn(102)], [turn(50), turn(51)], "hf")
    assert found["ratio"] == pytest.approx(2.0)
    assert found["ratio_of_pairs"] == [pytest.approx(2.0)] * 2
    assert found["noise"][OWN] == pytest.approx(0.02)
    assert "2.00 times the tokens/s of hf" in reported(found)
    assert "2.0% apart" in reported(found)


def test_no_ratio_is_stated_where_the_own_turns_disagree() -> None:
    found = comparison([turn(100), turn(104)], [turn(50), turn(51)], "hf")
    assert found["ratio"] is None
    assert found["ratio_of_pairs"] is None
    assert "4.0% apart, more than 3%" in reported(found)
    assert "times the tokens/s" not in reported(found)


def test_no_ratio_is_stated_over_other_tokens_and_other_losses_are_said() -> None:
    other = comparison([turn(100), turn(100)], [turn(50, tokens=90), turn(50)], "hf")
    assert other["ratio"] is None
    assert "the same tokens" in reported(other)
    losses = comparison([turn(100), turn(100)], [turn(50, [6.2, 6.5]), turn(50)], "hf")
    assert not losses["losses_agree"]
    assert "their losses differ by 6.6%" in reported(losses)
