"""planning/memory: the arithmetic of a plan, against the paper's figures and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_pl.errors import ConfigurationError
from qlora_pl.planning.memory.memory_plan import COMPONENTS, TrainingSetting, plan_memory
from qlora_pl.planning.memory.storage import bits_per_weight
from qlora_pl.planning.shapes.known_shapes import known_shape
from qlora_pl.planning.shapes.model_shape import ModelShape, shape_from_config

GUANACO: dict[str, Any] = {  # scripts/finetune_guanaco_*.sh of artidoro/qlora
    "adapter_dtype": "bfloat16",
    "dropout": 0.1,
    "tokens_per_row": 528,
    "has_mask": False,
    "num_micro_batches": 16,
}
SIZES = ("llama-7b", "llama-13b", "llama-33b", "llama-65b")


def shape_of(name: str) -> ModelShape:
    return shape_from_config(known_shape(name))


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # r x (inputs + outputs) of 7 matrices of each layer, by hand
        ("llama-7b", 64 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))),
        ("llama-65b", 799_539_200),
    ],
)
def test_adapters_have_as_many_weights_as_the_paper_says(name: str, expected: int) -> None:
    plan = plan_memory(shape_of(name), TrainingSetting(**GUANACO))
    assert plan.num_trained == expected
    assert plan.components["adapters"] == 2 * expected  # bfloat16


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
def test_a_quantised_weight_takes_the_papers_bits(double_quant: bool, bits: float) -> None:
    """Section 3: 0.5 bit of scales a weight, or 0.127; tables of codes add nothing to be seen."""
    setting = TrainingSetting(double_quant=double_quant)
    assert bits_per_weight(shape_of("llama-65b"), setting) == pytest.approx(bits, abs=0.001)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [  # the paper's Figure 6 reads about 6.9, 11.3, 24.7 and 45.0 with overhead
        ("llama-7b", 6.3),
        ("llama-13b", 11.0),
        ("llama-33b", 24.6),
        ("llama-65b", 46.2),
    ],
)
def test_the_papers_runs_take_what_was_published(name: str, gigabytes: float) -> None:
    plan = plan_memory(shape_of(name), TrainingSetting(**GUANACO))
    assert plan.before_overhead / 1e9 == pytest.approx(gigabytes, abs=0.2)


def test_components_add_up_at_the_fullest_moment() -> None:
    plan = plan_memory(shape_of("llama-7b"), TrainingSetting(**GUANACO))
    assert plan.components.keys() == COMPONENTS.keys()
    assert plan.total == sum(plan.components.values())
    assert plan.before_overhead == max(sum(parts.values()) for parts in plan.moments.values())
    assert plan.pageable == plan.components["paged_optimizer_state"]
    assert plan.allocated == plan.before_overhead - plan.pageable


@pytest.mark.parametrize("name", SIZES)
def test_qlora_takes_a_tenth_of_full_fine_tuning(name: str) -> None:
    full = TrainingSetting(**GUANACO | {"method": "none", "quant_type": "none", "dropout": 0.0})
    whole = plan_memory(shape_of(name), full).before_overhead
    assert plan_memory(shape_of(name), TrainingSetting(**GUANACO)).before_overhead < 0.2 * whole


def test_only_large_tensors_are_paged() -> None:
    """Bitsandbytes pages state of 100,000 elements or more: at rank 8 no A of a 7B's attention."""
    small = plan_memory(shape_of("llama-7b"), TrainingSetting(r=8)).components
    layers, rank = 32, 8
    sizes = [rank * 4096] * 6 + [rank * 4096] * 4 + [rank * 11008] * 3
    expected = layers * 8 * sum(size for size in sizes if size >= 100_000)
    assert small["paged_optimizer_state"] == expected
    everything = small["paged_optimizer_state"] + small["optimizer_state"]
    assert everything == layers * 8 * (sum(sizes) + rank * 4096)


def test_gradients_of_a_second_micro_batch_lie_beside_those_of_the_first() -> None:
    shape = shape_of("llama-7b")
    one = plan_memory(shape, TrainingSetting(num_micro_batches=1))
    two = plan_memory(shape, TrainingSetting(num_micro_batches=2))
    assert two.moments["the end of the backward"]["gradients"] == 2 * one.components["adapters"]
    stops = plan_memory(shape, TrainingSetting(num_micro_batches=2, splits_on_oom=False))
    assert stops.moments["the end of the backward"]["gradients"] == one.components["adapters"]


def test_devices_that_share_a_base_have_a_part_each_and_the_constants_whole() -> None:
    shape = shape_of("llama-65b")
    one = plan_memory(shape, TrainingSetting(**GUANACO)).components
    shared = plan_memory(
        shape, TrainingSetting(**GUANACO | {"strategy": "fsdp2", "num_devices": 2})
    ).components
    assert shared["packed_weights"] == one["packed_weights"] // 2
    assert shared["constants"] == one["constants"]
    assert shared["adapters"] == one["adapters"] // 2
    assert shared["communication"] > 2 * one["packed_weights"] // 80  # two layers of 80


def test_offloading_leaves_the_device_what_it_computes_with() -> None:
    setting = TrainingSetting(**GUANACO | {"strategy": "fsdp2_offload", "num_devices": 2})
    plan = plan_memory(shape_of("llama-65b"), setting)
    assert plan.components["packed_weights"] == plan.components["paged_optimizer_state"] == 0
    assert plan.host["packed_weights"] > 16e9
    assert plan.total < 8e9


@pytest.mark.parametrize("name", ["llama-7b", "llama-65b", "llama3-8b", "mistral-7b"])
def test_a_layer_keeps_what_the_page_says(name: str) -> None:
    """docs/memory.md has the sum by hand: 171 kB a token for a 7B."""
    shape, r, tokens = shape_of(name), 64, 512
    setting = TrainingSetting(adapter_dtype="bfloat16", tokens_per_row=tokens, has_mask=False, r=r)
    h, i, heads = shape.hidden_size, shape.mlp_size, shape.num_heads
    k = shape.num_kv_heads / heads
    by_hand = 16 * h + 4 * k * h + 8 * i + 14 * r + 4 * heads + 8
    layer = plan_memory(shape, setting).activations.layers[1]
    assert layer == tokens * by_hand
    if name == "llama-7b":
        assert by_hand == pytest.approx(171e3, rel=0.001)
    wide = plan_memory(shape, replace(setting, adapter_dtype="float32")).activations.layers[1]
    sides = sum(p.inputs + p.outputs for p in shape.linears)
    assert wide - layer == 2 * r * sides


def test_an_eager_kernel_grows_with_the_square_of_the_length() -> None:
    """Six bytes for each pair of tokens and head: probabilities in float32 and in bfloat16."""
    shape = shape_of("llama-7b")
    sizes = [
        plan_memory(
            shape,
            TrainingSetting(attention="eager", tokens_per_row=length, adapter_dtype="bfloat16"),
        ).activations.layers[1]
        for length in (1024, 2048)
    ]
    assert sizes[1] - 2 * sizes[0] == 32 * 6 * (2048**2 - 2 * 1024**2)


def test_every_setting_that_costs_memory_costs_some() -> None:
    shape = shape_of("llama-7b")
    base = plan_memory(shape, TrainingSetting()).before_overhead
    dearer: list[dict[str, Any]] = [
        {"double_quant": False},
        {"quant_type": "int8"},
        {"quant_type": "none"},
        {"skip_modules": ("down_proj",)},
        {"r": 128},
        {"dropout": 0.1},
        {"bias": "all", "r": 65},
        {"gradient_checkpointing": False},
        {"tokens_per_row": 2048},
        {"batch_size": 4},
        {"method": "dora"},
        {"compute_dtype": "float32"},
    ]
    for change in dearer:
        assert plan_memory(shape, TrainingSetting(**change)).before_overhead > base, change
    cheaper: list[dict[str, Any]] = [
        {"adapter_dtype": "bfloat16"},
        {"optimizer": "paged_adamw_8bit"},
        {"optimizer": "lion"},
        {"target_modules": ("q_proj", "v_proj")},
        {"block_size": 256},
        {"tokens_per_row": 128},
    ]
    for change in cheaper:
        assert plan_memory(shape, TrainingSetting(**change)).before_overhead < base, change


def test_a_rank_of_some_modules_counts_for_them_alone() -> None:
    shape = shape_of("llama-7b")
    plan = plan_memory(shape, TrainingSetting(r=64, rank_pattern={"q_proj": 8}))
    usual = plan_memory(shape, TrainingSetting(r=64))
    assert usual.num_trained - plan.num_trained == 32 * (64 - 8) * 2 * 4096


def test_a_target_that_no_module_has_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"no linear module matches 'qproj'.*'q_proj'"):
        plan_memory(shape_of("llama-7b"), TrainingSetting(target_modules=("qproj",)))


def test_impossible_settings_are_refused_together() -> None:
    with pytest.raises(ConfigurationError) as caught:
        TrainingSetting(batch_size=0, method="none")
    assert len(caught.value.problems) == 2


@pytest.mark.filterwarnings("ignore:.*")  # a command's words are parsed in this process
def test_an_experiment_is_planned_from_its_own_file() -> None:
    """guanaco7b: 16 and 512 tokens, one row, bfloat16 adapters, 16 micro-batches a step."""
    from qlora_pl.cli import read_runs
    from qlora_pl.planning.runs.settings import setting_of

    experiments = Path(__file__).parent.parent.parent / "experiments"
    names = ["guanaco7b", "guanaco65b", "bloom7b1_prompts", "t5_superni"]
    runs = read_runs([["--config", str(experiments / f"{name}.yaml")] for name in names])
    settings = [setting_of(run) for run in runs]
    assert settings[0] == TrainingSetting(**GUANACO)
    plan = plan_memory(shape_of(runs[1].model.model_name_or_path), settings[1])
    assert plan.num_trained == 799_539_200
    assert settings[2].num_micro_batches == 4
    assert settings[3].tokens_per_row == 1024
