"""Which strategies a run may name, and which one fits the GPUs where it names none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.loading.sharded_loading import refuse_unshardable
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.planning.memory.memory_plan import MemoryPlan
from qlora_pl.planning.shapes.known_shapes import known_shape
from qlora_pl.planning.shapes.model_shape import shape_from_config
from qlora_pl.strategies.choice import choose_strategy, refuse_other_strategies, strategy_named
from qlora_pl.strategies.ddp import AdapterDDP
from qlora_pl.strategies.fitting import plan_of
from qlora_pl.strategies.fsdp2 import FSDP2Strategy

GIB = 2**30


def refusal(strategy: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        refuse_other_strategies(SimpleNamespace(strategy=strategy, sync_batchnorm=False))
    (sentence,) = caught.value.problems
    return sentence


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload"])
def test_fsdp1_is_one_sentence_that_points_to_fsdp2(name: str) -> None:
    assert "take fsdp2 (configs/trainer/fsdp2.yaml)" in refusal(name)


def test_a_misspelt_strategy_is_told_what_was_meant() -> None:
    assert refusal("fsdp3").endswith("did you mean 'fsdp2'?")


def test_names_are_these_strategies() -> None:
    assert isinstance(strategy_named("ddp"), AdapterDDP)
    whole, offloaded = strategy_named("fsdp2"), strategy_named("fsdp2_offload")
    assert isinstance(whole, FSDP2Strategy)
    assert isinstance(offloaded, FSDP2Strategy)
    assert (whole.cpu_offload, offloaded.cpu_offload) == (False, True)


@pytest.mark.parametrize(
    ("whole", "shared", "chosen"),
    [(20, 12, "ddp"), (30, 18, "fsdp2"), (60, 30, "fsdp2_offload")],
)
def test_the_base_is_whole_on_each_gpu_where_that_fits(
    whole: float, shared: float, chosen: str
) -> None:
    name, reason = choose_strategy(whole * GIB, shared * GIB, 24 * GIB)
    assert name == chosen
    assert reason.startswith(f"strategy: {chosen}, since the whole base")
    assert f"{whole:.1f} GiB of 24.0" in reason


def plan(name: str, strategy: Any, num_devices: int) -> MemoryPlan:
    """Of a module and rows of the paper's settings, as ``strategy: auto`` makes it."""
    quantization = QuantizationConfig(compute_dtype="bfloat16")
    lora = LoRAConfig(r=64, dtype="bfloat16")
    module = QLoRAModule(name, quantization=quantization, lora=lora)
    data = InstructionDataModule([{"instruction": "a", "output": "b"}], batch_size=1)
    return plan_of(shape_from_config(known_shape(name)), module, data, strategy, num_devices)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("llama-7b", 6.9), ("llama-13b", 11.3), ("llama-33b", 24.7), ("llama-65b", 45.0)],
)
def test_the_papers_models_take_what_the_paper_says(name: str, gigabytes: float) -> None:
    """Figure 6 of the paper (512 tokens), read off; 7 % for the reading."""
    assert plan(name, "one", 1).total / 1e9 == pytest.approx(gigabytes, rel=0.07)


def test_a_shared_base_takes_its_part_and_a_layer() -> None:
    whole = plan("llama-65b", "ddp", 8)
    shared = plan("llama-65b", "fsdp2", 8)
    assert shared.total < plan("llama-65b", "fsdp2", 2).total < whole.total
    part = whole.components["packed_weights"] / 8
    assert part < shared.total - shared.components["activations"]


@pytest.mark.parametrize(
    ("part", "settings", "named"),
    [
        ("quantization", {"quant_type": "int8"}, "quant_type: int8"),
        ("quantization", {"storage_dtype": "bfloat16"}, "storage_dtype: bfloat16"),
        ("quantization", {"compute_dtype": "float16"}, "compute_dtype: float16"),
        ("lora", {"method": "dora"}, "model.lora.method: dora"),
        ("lora", {"init": "eva"}, "model.lora.init: eva"),
        ("lora", {"bias": "all"}, "model.lora.bias: all"),
        ("lora", {"trainable_tokens": ["<x>"]}, "model.lora.trainable_tokens"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(part: str, settings: Any, named: str) -> None:
    quantization = QuantizationConfig(**(settings if part == "quantization" else {}))
    lora = LoRAConfig(**(settings if part == "lora" else {}))
    with pytest.raises(ConfigurationError) as caught:
        refuse_unshardable(quantization, lora, grows_vocabulary=False)
    (sentence,) = caught.value.problems
    assert named in sentence
    assert "ddp takes all" in sentence
    refuse_unshardable(QuantizationConfig(), LoRAConfig(), grows_vocabulary=False)
