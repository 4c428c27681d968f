"""Adapters against plain PEFT, the paper's models by hand arithmetic, and float64."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import save_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import (
    CastingLinear,
    LoRAConfig,
    attach_adapters,
    resolve_targets,
)
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.compute import compute_cost
from qlora_pl.modeling.loading.base_loading import load_base
from qlora_pl.modeling.parameters import (
    adapter_tensors,
    count_parameters,
    logical_size,
    trainable_tensors,
)

# plain PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LAYER_0 = [
    *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
]
LAYER_1 = [name.replace("layers.0", "layers.1") for name in LAYER_0]
IDS = torch.arange(5, 37).reshape(2, 16)


@pytest.fixture(scope="module")
def skeleton(tiny_base: Path) -> nn.Module:
    return build_skeleton(tiny_base)


def load(folder: Path, compute: str = "float32", **settings: Any) -> nn.Module:
    config = QuantizationConfig(compute_dtype=compute, cache=False, **settings)
    plan = plan_quantization(build_skeleton(folder), config)
    identity = identify_base(str(folder), None, None)
    return load_base(identity, config, plan, device=torch.device("cpu")).model


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give every trained tensor random values; fresh B matrices are zero and would hide A."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_tensors(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


def plain_peft(model: nn.Module, config: LoRAConfig) -> nn.Module:
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            target_modules=[name.rpartition(".")[2] for name in LAYER_0],
            task_type="CAUSAL_LM",
        ),
    )


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    tensors = trainable_tensors(source)
    with torch.no_grad():
        for name, parameter in trainable_tensors(target).items():
            parameter.copy_(tensors[name])


def outputs_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    logits = model(input_ids=IDS).logits
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in trainable_tensors(model).items()}


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "heads", "expected"),
    [
        pytest.param(4096, 11008, 32, 32, 159_907_840, id="7B"),
        pytest.param(5120, 13824, 40, 40, 250_347_520, id="13B"),
        pytest.param(6656, 17920, 60, 52, 487_587_840, id="33B"),
        pytest.param(8192, 22016, 80, 64, 799_539_200, id="65B"),
    ],
)
def test_all_linear_at_r_64_trains_as_many_weights_as_the_original(
    hidden, intermediate, layers, heads, expected
):
    """Source: the original's printed counts; by hand, r x (inputs + outputs) of every matrix.

    Attention has four of hidden x hidden, the feed-forward part three of hidden x intermediate.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = attach_adapters(LlamaForCausalLM(config), LoRAConfig(r=64), seed=0)
    counts = count_parameters(model)
    by_hand = layers * 64 * (4 * 2 * hidden + 3 * (hidden + intermediate))
    assert counts.trainable == by_hand == expected
    base = layers * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden) + hidden
    assert counts.total == expected + base + 2 * 32000 * hidden


def test_packed_weights_count_as_what_they_hold(tiny_base):
    """By hand: two layers of (64 + 32 + 32 + 64) x 64 and 3 x 64 x 128 weights."""
    model = attach_adapters(load(tiny_base, "bfloat16"), LoRAConfig(r=4), seed=0)
    counts = count_parameters(model)
    packed = 2 * ((64 + 32 + 32 + 64) * 64 + 3 * 64 * 128)
    adapters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    rest = 2 * 512 * 64 + 5 * 64  # embedding and head, norms
    assert counts.by_dtype == {"nf4": packed, "bfloat16": rest, "float32": adapters}
    assert counts.trainable == adapters
    assert counts.total == packed + adapters + rest
    weight = model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    assert logical_size(weight) == 128 * 64
    # Bytes: half a byte and 1/64 for the scale of each weight; per matrix a table of 16 and one of
    # 256 float32 values, one second-level scale (there are at most 128 scales), and the offset.
    statistics = packed // 2 + packed // 64 + 14 * 4 * (16 + 256 + 1 + 1)
    assert counts.stored_bytes == statistics + 2 * rest + 4 * adapters


def test_a_tied_head_is_counted_once(tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    counts = count_parameters(load(base, quant_type="none"))
    assert counts.total == 2 * ((64 + 32 + 32 + 64) * 64 + 3 * 64 * 128) + 512 * 64 + 5 * 64


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_arithmetic_of_a_step_is_what_the_shapes_say(tmp_path, tied):
    """By hand, for 10 tokens of which 6 are trained, in rows of 7 and 3."""
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    cost = compute_cost(attach_adapters(load(base), LoRAConfig(r=4), seed=0))
    matrices = 2 * ((64 + 32 + 32 + 64) * 64 + 3 * 64 * 128)
    adapters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert (cost.matrices, cost.head, cost.adapters) == (matrices, 512 * 64, adapters)
    frozen = 10 * matrices * (2 + 2)  # forward, and gradients of inputs
    trained = 10 * adapters * (2 + 4)  # and of weights
    head = 6 * 512 * 64 * (2 + 2)
    scores = 2 * (7**2 + 3**2) // 2 * 4 * 16 * 2  # causal, 4 heads of 16, 2 layers
    attention = 2 * scores * (1 + 2)  # scores and weighted sums; each backward is two products
    assert cost.of_step(10, 6, 7**2 + 3**2) == frozen + trained + head + attention


# --- which modules --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("all-linear", LAYER_0 + LAYER_1),
        (["q_proj"], [LAYER_0[0], LAYER_1[0]]),
        ("q_proj", [LAYER_0[0], LAYER_1[0]]),
        (["0.self_attn.q_proj", "down_proj"], [LAYER_0[0], LAYER_0[6], LAYER_1[6]]),
        (["model.layers.1.mlp.up_proj"], [LAYER_1[5]]),
        (r"model\.layers\.1\..*", LAYER_1),
        (r".*\.(q|v)_proj", [LAYER_0[0], LAYER_0[2], LAYER_1[0], LAYER_1[2]]),
    ],
)
def test_target_modules_are_names_parts_of_names_or_one_pattern(skeleton, wanted, expected):
    assert resolve_targets(skeleton, LoRAConfig(target_modules=wanted)) == expected


@pytest.mark.parametrize("wanted", [["q_proj"], r"model\.layers\.1\..*", ["0.mlp.up_proj"]])
def test_peft_adapts_exactly_the_resolved_modules(tiny_base, wanted):
    config = LoRAConfig(r=4, target_modules=wanted)
    base = load(tiny_base)
    expected = resolve_targets(base, config)
    model = attach_adapters(base, config, seed=0)
    adapted = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert [name.removeprefix("base_model.model.") for name in adapted] == expected


@pytest.mark.parametrize("wanted", [["q_porj", "v_proj"], ["q_porj"], "q_porj"])
def test_a_misspelt_target_is_named_with_the_likely_one(skeleton, wanted):
    with pytest.raises(ConfigurationError, match=r"'q_porj'; did you mean 'q_proj'\?"):
        resolve_targets(skeleton, LoRAConfig(target_modules=wanted))


@pytest.mark.parametrize("wanted", [["embed_tokens"], ["norm"], ["all-linear"], "nothing.*"])
def test_what_is_no_linear_module_cannot_be_adapted(skeleton, wanted):
    with pytest.raises(ConfigurationError, match="no linear module matches"):
        resolve_targets(skeleton, LoRAConfig(target_modules=wanted))


@pytest.mark.parametrize("wanted", [["lm_head"], ["q_proj", "lm_head"], ".*", "lm_head"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_is_refused(tmp_path, wanted, tied):
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    with pytest.raises(ConfigurationError, match="'lm_head' is the output head"):
        resolve_targets(build_skeleton(base), LoRAConfig(target_modules=wanted))


def test_every_problem_of_the_settings_is_reported_at_once():
    with pytest.raises(ConfigurationError) as caught:
        LoRAConfig(r=0, alpha=0, dropout=1.0, target_modules="(")
    keys = [problem.split(":")[0] for problem in caught.value.problems]
    assert keys == [f"model.lora.{key}" for key in ("r", "alpha", "dropout", "target_modules")]
    with pytest.raises(ConfigurationError, match="names no module"):
        LoRAConfig(target_modules=[])


# --- how they start -------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_start_depends_on_the_seed_and_on_nothing_drawn_before(tiny_base, init):
    def start(seed: int, num_draws: int) -> dict[str, Tensor]:
        torch.rand(num_draws)
        model = attach_adapters(load(tiny_base), LoRAConfig(r=4, init=init), seed)
        return {name: p.detach() for name, p in trainable_tensors(model).items()}

    first, again, other = start(3, 0), start(3, 17), start(4, 0)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if "lora_A" in name:
            assert not torch.equal(tensor, other[name])
            assert tensor.any()
        else:
            assert not tensor.any()


def test_attaching_leaves_every_global_generator_as_it_was(tiny_base):
    base = load(tiny_base)
    for module in (torch, np.random, random):
        getattr(module, "manual_seed", getattr(module, "seed", None))(5)
    expected = torch.rand(3), np.random.rand(), random.random()
    for module in (torch, np.random, random):
        getattr(module, "manual_seed", getattr(module, "seed", None))(5)
    attach_adapters(base, LoRAConfig(r=4), seed=9)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]


def test_training_starts_at_the_base(tiny_base):
    base = load(tiny_base)
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        after = attach_adapters(base, LoRAConfig(r=4), seed=0)(input_ids=IDS).logits
    assert torch.equal(before, after)


# --- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_in_float32_outputs_and_gradients_are_plain_pefts_bit_for_bit(tiny_base, quant_type):
    """Source: peft.get_peft_model without this project's layers."""
    config = LoRAConfig(r=4, alpha=8.0)
    ours = attach_adapters(load(tiny_base, quant_type=quant_type), config, seed=0)
    theirs = plain_peft(load(tiny_base, quant_type=quant_type), config)
    fill(ours)
    copy_adapters(ours, theirs)
    logits, gradients = outputs_and_gradients(ours)
    expected_logits, expected = outputs_and_gradients(theirs)
    assert torch.equal(logits, expected_logits)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16])
def test_over_bf16_activations_products_are_as_good_as_bf16_allows(kept_in):
    """Source: the same product and gradients in float64, from the same bf16 input.

    Rounding to bf16 moves a number by 2**-8 of its size at most (half of its eps, 2**-7). The
    weight is rounded once, the result once, and sums are float32 in between; over random signs the
    norm of the error keeps the proportion of its terms, so it is at most 2 x 2**-8 of the result's.
    """
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(32, 64, generator=draw))
    reference = layer.weight.detach().to(kept_in).double().requires_grad_()
    layer.to(kept_in).__class__ = CastingLinear
    x = torch.randn(100, 64, generator=draw).bfloat16().requires_grad_()
    upstream = torch.randn(100, 32, generator=draw).bfloat16()
    output = layer(x)
    output.backward(upstream)
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x @ reference.t()
    exact.backward(upstream.double())
    assert output.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == kept_in
    for ours, expected in [
        (output, exact),
        (x.grad, exact_x.grad),
        (layer.weight.grad, reference.grad),
    ]:
        error = (ours.double() - expected).norm() / expected.norm()
        assert error < 2 * 2**-8


def test_a_layer_with_a_bias_multiplies_in_its_inputs_type():
    layer = nn.Linear(64, 8)
    layer.__class__ = CastingLinear
    output = layer(torch.ones(2, 64, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert torch.equal(layer(torch.ones(2, 64)), nn.Linear.forward(layer, torch.ones(2, 64)))


def test_float32_adapters_keep_updates_that_bfloat16_loses(tiny_base):
    """By hand: at 1.0 neighbouring bf16 numbers are 2**-8 (below) and 2**-7 (above) apart."""
    for dtype, is_moved in [("float32", True), ("bfloat16", False)]:
        model = attach_adapters(load(tiny_base), LoRAConfig(r=4, dtype=dtype), seed=0)
        parameters = list(trainable_tensors(model).values())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
            nn.init.ones_(parameter)
        torch.optim.SGD(parameters, lr=2e-4).step()
        assert all((parameter != 1).all().item() is is_moved for parameter in parameters)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_models_activations_stay_in_the_compute_type(tiny_base, compute):
    """PEFT alone would hand float32 copies of bf16 activations to every adapter."""
    model = attach_adapters(load(tiny_base, compute), LoRAConfig(r=4), seed=0)
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, CastingLinear):
            assert module.weight.dtype == torch.float32, name
            module.register_forward_hook(lambda _, x, y: seen.update((x[0].dtype, y.dtype)))
    model(input_ids=IDS)
    assert seen == {getattr(torch, compute)}


# --- what is saved --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("wanted", ["all-linear", r"model\.layers\.1\.self_attn\..*"])
def test_plain_peft_loads_the_saved_tensors_to_the_same_logits(tmp_path, bias, wanted):
    """Source: peft.PeftModel.from_pretrained over another copy of the base."""
    base = save_base(tmp_path / "base", attention_bias=True)
    config = LoRAConfig(r=4, bias=bias, target_modules=wanted)
    model = attach_adapters(load(base), config, seed=0)
    fill(model)
    tensors = adapter_tensors(model)
    assert len(tensors) == len(trainable_tensors(model))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(base), tmp_path)
    model.eval()
    with torch.no_grad():
        expected, base_only = model(input_ids=IDS).logits, load(base)(input_ids=IDS).logits
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
    assert not torch.equal(expected, base_only)


def test_saved_tensors_are_named_as_plain_peft_names_them(tiny_base, tmp_path):
    """Source: the file that peft's own save_pretrained writes."""
    config = LoRAConfig(r=4)
    plain_peft(load(tiny_base), config).save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    tensors = adapter_tensors(attach_adapters(load(tiny_base), config, seed=0))
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in expected.items()}


def test_saving_asks_neither_the_bases_folder_nor_the_hub(tmp_path):
    """PEFT would, for a vocabulary that has grown, and warn that it finds nothing."""
    base = save_base(tmp_path / "base")
    model = attach_adapters(load(base), LoRAConfig(r=4), seed=0)
    base.rename(tmp_path / "elsewhere")
    assert len(adapter_tensors(model)) == 28


def test_saved_tensors_do_not_move_when_training_goes_on(tiny_base):
    model = attach_adapters(load(tiny_base), LoRAConfig(r=4), seed=0)
    saved = adapter_tensors(model)
    fill(model)
    assert not any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
