"""Operations and traffic of a run, held against what a loaded model counts and what was published.

``modeling.compute`` counts real modules; the totals of LLaMA are those of its paper's table of
shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_runs import load
from families import FAMILIES, Family

from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.compute import compute_cost
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.shapes.known_shapes import known_shape
from qlora_pl.planning.shapes.model_shape import shape_from_config, shape_of_skeleton
from qlora_pl.planning.work.cards import card_named
from qlora_pl.planning.work.operations import Batch, Work, micro_batch_time, run_time
from qlora_pl.planning.work.step_work import average_batch, work_of

PAPER = TrainingSetting(adapter_dtype="bfloat16", tokens_per_row=512, has_mask=False)


def work_named(name: str, setting: TrainingSetting = PAPER) -> Work:
    return work_of(shape_from_config(known_shape(name)), setting)


@pytest.mark.parametrize(
    ("name", "matrices", "adapters"),
    [
        ("llama-7b", 6_476_005_376, 159_907_840),
        ("llama-13b", 12_687_769_600, 250_347_520),
        ("llama-33b", 32_102_154_240, 487_587_840),
        ("llama-65b", 64_760_053_760, 799_539_200),
    ],
)
def test_llama_has_the_weights_that_its_table_of_shapes_gives(
    name: str, matrices: int, adapters: int
) -> None:
    work = work_named(name)
    assert (work.matrices, work.adapters, work.packed) == (matrices, adapters, matrices)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_both_counts_of_a_models_arithmetic_agree(
    family: Family, saved: Callable[[str], Path]
) -> None:
    """Of a real model with adapters, and of its config.json."""
    folder = saved(family.name)
    work = work_of(shape_of_skeleton(build_skeleton(folder)), replace(PAPER, r=4))
    cost = compute_cost(attach_adapters(load(folder).model, LoRAConfig(r=4), 0))
    assert (work.matrices, work.adapters, work.head) == (cost.matrices, cost.adapters, cost.head)
    assert (work.target_matrices, work.target_adapters) == (
        cost.target_matrices,
        cost.target_adapters,
    )
    counts = (1000, 300, 50_000)
    assert work.model_flops(*counts) == cost.of_step(*counts)


def test_a_frozen_base_costs_four_operations_a_weight_and_six_with_checkpointing() -> None:
    """Attention aside, which has no weights: a batch without pairs."""
    kept = work_named("llama-65b", replace(PAPER, gradient_checkpointing=False, r=1))
    again = work_named("llama-65b", replace(PAPER, r=1))
    whole = work_named(
        "llama-65b", replace(PAPER, quant_type="none", double_quant=False, method="none")
    )
    assert kept.hardware_flops(1, 0, 0) / kept.matrices == pytest.approx(4, rel=2e-3)
    assert again.hardware_flops(1, 0, 0) / again.matrices == pytest.approx(6, rel=2e-3)
    assert whole.hardware_flops(1, 0, 0) / whole.matrices == pytest.approx(8, rel=2e-3)
    assert again.model_flops(1, 0, 0) == kept.model_flops(1, 0, 0)


def test_decoding_is_paid_once_a_pass_whatever_the_batch() -> None:
    """2.516 bytes a weight: 0.516 of codes and constants read, 2 of bfloat16 written."""
    work = work_named("llama-7b")
    assert work.decoding_bytes == pytest.approx(3 * 2.516 * 6_476_005_376)
    assert work_named("llama-7b", replace(PAPER, gradient_checkpointing=False)).num_passes == 2
    none = replace(PAPER, quant_type="none", double_quant=False)
    assert work_named("llama-7b", none).decoding_bytes == 0


PUBLISHED = [
    # name, card, rows, tokens, dropout, checkpointing, tokens a second and GPU
    ("llama2-7b", "RTX3090", 8, 2048, 0.0, True, 1198),  # fsdp_qlora's benchmarks, DDP
    ("llama2-7b", "RTX4090", 8, 2048, 0.0, True, 2330),  # idem
    ("llama2-70b", "A100-40GB", 8, 2048, 0.0, True, 390),  # idem, FSDP on eight
    ("llama3-8b", "RTX4090", 2, 2048, 0.0, True, 2413),  # torchtune's README, compiled
    ("qwen2.5-7b", "A100-80GB", 1, 2048, 0.0, True, 2341),  # Qwen's README, of Qwen-7B
    ("qwen2.5-72b", "A100-80GB", 1, 2048, 0.0, True, 275),  # idem, of Qwen-72B
    ("llama2-7b", "A100-80GB", 4, 1024, 0.0, True, 2415),  # LLaMA-Factory's wiki
]
"""Throughputs of other programs; none of them is this one, and some run compiled kernels."""


@pytest.mark.parametrize(("name", "card", "rows", "tokens", "dropout", "again", "rate"), PUBLISHED)
def test_an_estimate_is_within_a_factor_of_two_of_published_throughputs(
    name: str, card: str, rows: int, tokens: int, dropout: float, again: bool, rate: float
) -> None:
    setting = replace(
        PAPER,
        batch_size=rows,
        tokens_per_row=tokens,
        dropout=dropout,
        gradient_checkpointing=again,
        r=16,
    )
    shape = shape_from_config(known_shape(name))
    work, batch = work_of(shape, setting), average_batch(shape, setting)
    time = micro_batch_time(work, batch, card_named(card))
    assert time is not None
    assert 0.5 < batch.tokens / time.total / rate < 2.0


def test_hours_energy_and_price_follow_from_the_number_of_micro_batches() -> None:
    work, card = work_named("llama-7b"), card_named("a6000")
    batch = Batch(tokens=512, trained=511, pairs=512 * 512)
    time = micro_batch_time(work, batch, card)
    assert time is not None
    one = run_time(work, batch, card, 1, 30_000)
    two = run_time(work, batch, card, 2, 15_000)
    assert one is not None
    assert two is not None
    assert one.hours == pytest.approx(30_000 * time.total / 3600)
    assert two.hours == pytest.approx(one.hours / 2)
    assert (two.price, two.kilowatt_hours) == pytest.approx((one.price, one.kilowatt_hours))
    assert one.kilowatt_hours == pytest.approx(one.hours * 0.3)  # the board's 300 W
    assert one.share_without_recomputing < one.share_of_peak < 0.65
    assert run_time(work, batch, card_named("48GiB"), 1, 30_000) is None


def test_a_limit_for_answers_adds_nothing_to_rows_that_hold_them_already() -> None:
    """``encoding: original`` limits an answer within its row; only an encoder's run has two."""
    setting = replace(PAPER, tokens_per_row=528, target_tokens_per_row=512)
    causal = average_batch(shape_from_config(known_shape("llama-7b")), setting)
    paired = average_batch(shape_from_config(known_shape("t5-v1_1-xl")), setting)
    assert (causal.tokens, paired.tokens) == (528, 1040)
    half = average_batch(shape_from_config(known_shape("llama-7b")), setting, None, 264)
    assert (half.tokens, half.pairs) == (264, 264**2)


def test_small_models_wait_for_kernels_to_be_launched() -> None:
    work = work_named("smollm2-135m")
    time = micro_batch_time(work, Batch(tokens=64, trained=63, pairs=4096), card_named("h200"))
    assert time is not None
    assert time.total == time.launching > time.products + time.decoding + time.elementwise
