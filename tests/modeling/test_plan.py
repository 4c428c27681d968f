"""Every weight matrix has a fate before loading: packed, kept by name, or refused in one sentence.

Expected values are counts of parameters by hand, the modules that plain transformers quantises, and
float32 twins of plain transformers that hold the dequantised weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import one_thread, twin_of  # noqa: F401
from bitsandbytes.nn import Linear4bit
from families import COMMON, LLAMA_LIKE, Family
from torch import Tensor, nn
from torch.nn import functional

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters, resolve_targets
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import (
    QuantizationPlan,
    build_skeleton,
    plan_quantization,
)
from qlora_pl.modeling.base.structure import is_plain_product, linear_names, matrices
from qlora_pl.modeling.compute import compute_cost
from qlora_pl.modeling.loading.base_loading import (
    LoadedBase,
    bitsandbytes_config,
    load_base,
    prepare_for_training,
)
from qlora_pl.modeling.parameters import trainable_tensors
from qlora_pl.modeling.steps.loss import causal_lm_loss
from qlora_pl.modeling.summary import summarize

CPU = torch.device("cpu")
LORA = LoRAConfig(r=4)
NF4 = QuantizationConfig(compute_dtype="float32", cache=False)


def skeleton_of(model_type: str, settings: dict[str, Any], folder: Path) -> nn.Module:
    """A model without weights, from its configuration alone."""
    from transformers import AutoConfig

    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return build_skeleton(folder)


def load(folder: Path, **settings: Any) -> LoadedBase:
    config = QuantizationConfig(**{"cache": False, "compute_dtype": "float32"} | settings)
    plan = plan_quantization(build_skeleton(folder), config)
    return load_base(identify_base(str(folder), None, None), config, plan, device=CPU)


def packed_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def owners(parameters: Any) -> set[str]:
    return {name.rpartition(".")[0] for name in parameters}


# --- subclasses of nn.Linear ----------------------------------------------------------------------


class Restated(nn.Linear):
    """Falcon's way of writing the same product."""

    def forward(self, input: Tensor) -> Tensor:
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Renamed(nn.Linear):
    """Nothing of its own."""


class Scaled(nn.Linear):
    """Multiplied by a number, which may be one."""

    factor = 1.5

    def forward(self, input: Tensor) -> Tensor:
        return self.factor * super().forward(input)


class WithoutItsBias(nn.Linear):
    """Has a bias that somebody else adds."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight)


class ClampedInHalf(nn.Linear):
    """Clamped only where float16 ends."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-65504, 65504)


class SoftCapped(nn.Linear):
    """Never beyond 1,000."""

    def forward(self, input: Tensor) -> Tensor:
        return 1e3 * torch.tanh(super().forward(input) / 1e3)


class Rounded(nn.Linear):
    """Multiplies in bfloat16, as a router that is kept small may."""

    def forward(self, input: Tensor) -> Tensor:
        half = functional.linear(input.bfloat16(), self.weight.bfloat16())
        return half.float() if self.bias is None else half.float() + self.bias


class Dropping(nn.Linear):
    """A product in evaluation only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.dropout(input, 0.1, self.training))


class Shifted(nn.Linear):
    """Adds a buffer, which is zero when the module is made."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register_buffer("shift", torch.zeros(self.out_features))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.shift


class OfTwo(nn.Linear):
    """Takes two inputs."""

    def forward(self, input: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) * gate


class WithScores(nn.Linear):
    """Gives two outputs."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(input)
        return out, out.softmax(-1)


class OfLastToken(nn.Linear):
    """Gives another shape."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input[..., -1:, :])


PLAIN = [Restated, Renamed]
OTHER = [
    Scaled, WithoutItsBias, ClampedInHalf, SoftCapped, Rounded, Dropping, Shifted, OfTwo,
    WithScores, OfLastToken,
]  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN + OTHER, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_subclass_is_plain_exactly_if_it_is_a_product(kind: type, device: str) -> None:
    """Source: what each of the classes above says that it computes."""
    with torch.device(device):
        module = kind(64, 32)
    torch.manual_seed(5)
    assert is_plain_product(module) is (kind in PLAIN)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # trying it out draws nothing from the run's generator


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    """A skeleton whose modules a test may change."""
    return skeleton_of("llama", LLAMA_LIKE, tmp_path / "llama")


@pytest.mark.parametrize("kind", OTHER, ids=lambda kind: kind.__name__)
def test_a_subclass_that_does_more_is_refused_by_name_and_may_be_kept(
    llama: Any, kind: type
) -> None:
    with torch.device("meta"):
        llama.model.layers[1].mlp.down_proj = kind(128, 64, bias=kind is WithoutItsBias)
    with pytest.raises(ConfigurationError) as caught:
        plan_quantization(llama, NF4)
    (sentence,) = caught.value.problems
    assert f"'model.layers.1.mlp.down_proj' is a {kind.__name__}, which does more" in sentence
    assert "list 'down_proj' in model.quantization.skip_modules" in sentence
    plan = plan_quantization(llama, QuantizationConfig(skip_modules=("1.mlp.down_proj",)))
    assert plan.kept["model.layers.1.mlp.down_proj.weight"] == "linear"
    assert len(plan.quantized) == 13
    assert plan.replaced_classes == ()


def test_each_module_of_a_subclass_is_tried_that_is_set_up_differently(llama: Any) -> None:
    """The first is plain; that its class is says nothing of the others."""
    for layer, factor in ((0, 1.0), (1, 2.0)):
        with torch.device("meta"):
            module = Scaled(128, 64, bias=False)
        module.factor = factor
        llama.model.layers[layer].mlp.down_proj = module
    with pytest.raises(ConfigurationError, match=r"'model.layers.1.mlp.down_proj' is a Scaled"):
        plan_quantization(llama, NF4)
    llama.model.layers[1].mlp.down_proj.factor = 1.0
    plan = plan_quantization(llama, NF4)
    assert len(plan.quantized) == 14
    assert plan.replaced_classes == (f"{__name__}.Scaled",)


class Conv1D(nn.Module):
    """Not transformers', though called the same: its matrix is not transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, 128))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


def test_a_module_that_is_only_called_conv1d_is_not_packed_transposed(llama: Any) -> None:
    with torch.device("meta"):
        llama.model.layers[1].mlp.down_proj = Conv1D()
    with pytest.raises(ConfigurationError, match=r"down_proj.weight' belongs to no linear module"):
        plan_quantization(llama, NF4)


def test_a_plan_that_packs_nothing_is_refused(llama: Any) -> None:
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    with pytest.raises(ConfigurationError, match="nothing is left to quantise") as caught:
        plan_quantization(llama, QuantizationConfig(skip_modules=parts))
    assert len(caught.value.problems) == 1


# --- mixtures of experts --------------------------------------------------------------------------

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
MIXTURES = {  # model_type: (settings, the modules of its fused experts, routers in two layers)
    "mixtral": (EXPERTS, ["experts"], 2),
    "qwen2_moe": (EXPERTS, ["experts"], 4),  # the shared expert's gate as well
    "qwen3_moe": (EXPERTS, ["experts"], 2),
    "phimoe": (EXPERTS, ["experts"], 2),
    "olmoe": (EXPERTS, ["experts"], 2),
    "gpt_oss": (EXPERTS | {"layer_types": ["full_attention"] * 2}, ["experts"], 2),
    "deepseek_v3": (DEEPSEEK, ["experts"], 1),
    "jetmoe": (EXPERTS | {"kv_channels": 16}, ["input_linear", "output_linear"], 4),
}
every_mixture = pytest.mark.parametrize("model_type", MIXTURES)


def mixture(model_type: str, folder: Path) -> tuple[nn.Module, tuple[str, ...], int]:
    settings, experts, num_routers = MIXTURES[model_type]
    return skeleton_of(model_type, LLAMA_LIKE | settings, folder), tuple(experts), num_routers


@every_mixture
def test_fused_experts_are_refused_with_their_share(model_type: str, tmp_path: Path) -> None:
    """Source: the elements of every parameter of three dimensions."""
    skeleton, experts, _ = mixture(model_type, tmp_path)
    fused = {name: p.numel() for name, p in skeleton.named_parameters() if p.ndim == 3}
    share = sum(fused.values()) / sum(p.numel() for p in skeleton.parameters())
    with pytest.raises(ConfigurationError) as caught:
        plan_quantization(skeleton, NF4)
    (sentence,) = caught.value.problems
    assert f"'{next(iter(fused))}' holds fused experts" in sentence
    assert f"({share:.0%} of the weights)" in sentence
    assert f"skip_modules: [{experts[0]}]" in sentence


@every_mixture
def test_no_router_is_ever_packed_or_adapted(model_type: str, tmp_path: Path) -> None:
    """Source: hand count; a router has as many rows as there are experts, or one."""
    skeleton, experts, num_routers = mixture(model_type, tmp_path)
    plan = plan_quantization(skeleton, QuantizationConfig(skip_modules=experts))
    sizes = {name: p.shape[0] for name, p in skeleton.named_parameters() if p.ndim == 2}
    routers = {name for name, rows in sizes.items() if rows in (1, 4) and "bias" not in name}
    assert len(routers) == num_routers
    assert {name for name, role in plan.kept.items() if role == "router"} == routers
    assert not routers & plan.quantized.keys()
    assert not owners(routers) & set(linear_names(skeleton))
    assert set(plan.kept.values()) <= {
        "router", "experts", "embedding", "head", "other",
    }  # fmt: skip


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_a_mixture_with_its_experts_kept_computes_what_its_float32_twin_does(
    model_type: str, tmp_path: Path
) -> None:
    settings, experts, _ = MIXTURES[model_type]
    family = Family(model_type, model_type, LLAMA_LIKE | settings, (), 0)
    assert_equals_twin(family, tmp_path, skip_modules=tuple(experts))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_adapters_that_peft_puts_elsewhere_are_refused(tmp_path: Path) -> None:
    """For some mixtures PEFT reads ``gate_proj`` as the experts' weights, and passes over the MLPs.

    Every program that loads the adapter would do the same, so it is of no use to prevent it here.
    """
    settings = LLAMA_LIKE | DEEPSEEK
    folder = Family("DeepSeek-V3", "deepseek_v3", settings, (), 0).save(tmp_path / "base")
    with pytest.raises(ConfigurationError) as caught:
        attach_adapters(load(folder, skip_modules=("experts",)).model, LORA, seed=0)
    (sentence,) = caught.value.problems
    assert "PEFT" in sentence
    assert "mlp" in sentence
    parts = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    assert f"model.lora.target_modules: [{', '.join(sorted(parts))}]" in sentence
    adapted = attach_adapters(
        load(folder, skip_modules=("experts",)).model,
        LoRAConfig(r=4, target_modules=parts),
        seed=0,
    )
    trained = {name.split(".lora_")[0] for name in trainable_tensors(adapted)}
    assert {name.rpartition(".")[2] for name in trained} == set(parts)
    assert len(trained) == 2 * len(parts)


# --- families that nobody listed ------------------------------------------------------------------

MAMBA = COMMON | {
    "hidden_size": 64,
    "state_size": 16,
    "num_hidden_layers": 2,
    "time_step_rank": 64,
}
UNLISTED = {
    "gptj": COMMON
    | {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "rotary_dim": 8,
        "initializer_range": 0.1,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "starcoder2": LLAMA_LIKE,
    "rwkv": COMMON
    | {
        "hidden_size": 64,
        "attention_hidden_size": 64,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "context_length": 64,
        "rescale_every": 0,
    },
    "recurrent_gemma": LLAMA_LIKE
    | {
        "lru_width": 64,
        "attention_window_size": 64,
        "block_types": ["recurrent", "attention"],
    },
}
KEPT = {  # what of the above is neither linear nor embedding, norm or head
    "rwkv": {"time_mix_key", "time_mix_value", "time_mix_receptance"},
    "recurrent_gemma": {
        "conv_1d.weight", "rg_lru.input_gate_weight", "rg_lru.input_gate_bias",
        "rg_lru.recurrent_gate_weight", "rg_lru.recurrent_gate_bias",
    },
}  # fmt: skip


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.arange(5, 37).reshape(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    prepare_for_training(model, gradient_checkpointing=False)
    loss = causal_lm_loss(model, batch).total
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in trainable_tensors(model).items() if p.grad is not None
    }


def assert_equals_twin(family: Family, folder: Path, **settings: Any) -> LoadedBase:
    """1e-5 of the largest: float32 sums of up to 1,024 products, of the same numbers."""
    base = family.save(folder / "base")
    loaded = load(base, **settings)
    twin = attach_adapters(twin_of(loaded, base), LORA, seed=0)
    model = attach_adapters(loaded.model, LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable_tensors(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    twin.load_state_dict({n: p.data for n, p in trainable_tensors(model).items()}, strict=False)
    loss, gradients = loss_and_gradients(model)
    expected, reference = loss_and_gradients(twin)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == reference.keys() == trainable_tensors(model).keys()
    for name, gradient in gradients.items():
        largest = reference[name].abs().max().item()
        torch.testing.assert_close(gradient, reference[name], rtol=0, atol=1e-5 * largest)
    return loaded


@pytest.mark.parametrize("model_type", UNLISTED)
def test_a_family_that_nobody_listed_computes_what_its_float32_twin_does(
    model_type: str, tmp_path: Path
) -> None:
    family = Family(model_type, model_type, UNLISTED[model_type], (), 0)
    skip = ("rg_lru",) if model_type == "recurrent_gemma" else ()  # 2 % of so small a model
    loaded = assert_equals_twin(family, tmp_path, skip_modules=skip)
    kept = {name for name, role in loaded.plan.kept.items() if role not in ("embedding", "head")}
    expected = KEPT.get(model_type, set())
    assert all(any(name.endswith(f".{end}") for end in expected) for name in kept)
    assert all(any(name.endswith(f".{end}") for name in kept) for end in expected)
    assert compute_cost(loaded.model).matrices > 0
    listed = summarize("a base", loaded.model, loaded, NF4).partition("not quantised: ")[2]
    assert bool(listed) is bool(kept)
    assert all(name in listed for name in sorted(kept)[:1])


def test_a_small_convolution_is_kept_and_a_large_one_refused_with_its_share(
    tmp_path: Path,
) -> None:
    """Source: the elements of the convolutions' kernels; a hundredth is the limit."""
    heads = {"num_heads": 4, "head_dim": 32, "n_groups": 1}
    for conv_kernel, is_small in ((2, True), (4, False)):
        settings = MAMBA | heads | {"conv_kernel": conv_kernel}
        skeleton = skeleton_of("mamba2", settings, tmp_path / str(conv_kernel))
        sizes = {name: p.numel() for name, p in skeleton.named_parameters()}
        convolutions = [name for name in sizes if "conv1d.weight" in name]
        share = sum(sizes[name] for name in convolutions) / sum(sizes.values())
        assert (share <= 0.01) is is_small
        if is_small:
            plan = plan_quantization(skeleton, NF4)
            assert {name for name, role in plan.kept.items() if role == "other"} == set(
                convolutions
            )
        else:
            with pytest.raises(ConfigurationError, match=r"conv1d.weight' belongs to no linear"):
                plan_quantization(skeleton, NF4)


def test_a_weight_read_outside_its_layer_is_one_sentence(tmp_path: Path) -> None:
    """Mamba multiplies by ``dt_proj.weight`` itself; packed bytes have another shape."""
    folder = Family("Mamba", "mamba", MAMBA, (), 0).save(tmp_path / "base")
    with pytest.raises(ConfigurationError) as caught:
        load(folder, skip_modules=("mixer", "conv1d"))
    (sentence,) = caught.value.problems
    assert "\n" not in sentence
    assert "the loaded MambaForCausalLM cannot be run" in sentence
    loaded = load(folder, skip_modules=("mixer", "conv1d", "dt_proj"))
    assert {name.rpartition(".")[2] for name in packed_modules(loaded.model)} == {
        "in_proj", "x_proj", "out_proj",
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"PEFT .*out_proj") as caught:
        attach_adapters(loaded.model, LORA, seed=0)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_family_that_rewrites_its_weights_is_one_sentence(
    quant_type: str, tmp_path: Path
) -> None:
    """RWKV halves matrices in evaluation and doubles them in training: also where they are codes.

    Left as they are in 16 bits, halving and doubling are exact.
    """
    family = Family("RWKV", "rwkv", UNLISTED["rwkv"] | {"rescale_every": 1}, (), 0)
    folder = family.save(tmp_path / "base")
    with pytest.raises(ConfigurationError) as caught:
        load(folder, quant_type=quant_type)
    (sentence,) = caught.value.problems
    assert "'rwkv.blocks.0.attention.output.weight' is changed by" in sentence
    assert "list 'output' in model.quantization.skip_modules" in sentence
    with pytest.raises(ConfigurationError, match=r"list that layer in model.quant"):
        load(folder, quant_type=quant_type, skip_modules=("output",))
    loaded = load(folder, quant_type=quant_type, skip_modules=("output", "value"))
    assert len(loaded.plan.quantized) == 8


def test_a_family_that_cannot_recompute_activations_is_one_sentence(tmp_path: Path) -> None:
    settings = COMMON | {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
    folder = Family("GPT", "openai-gpt", settings, (), 0).save(tmp_path / "base")
    model = attach_adapters(load(folder).model, LORA, seed=0)
    with pytest.raises(ConfigurationError, match=r"^model.gradient_checkpointing: .* false"):
        prepare_for_training(model, gradient_checkpointing=True)
    prepare_for_training(model, gradient_checkpointing=False)
    assert model.training


# --- what plain transformers makes of the same ----------------------------------------------------

JAMBA = LLAMA_LIKE | {
    "mamba_dt_rank": 64,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "use_mamba_kernels": False,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}


@pytest.mark.parametrize(
    ("model_type", "settings", "skip"),
    [
        ("jamba", JAMBA, ("mamba",)),  # a parameter of its own beside its linear modules
        ("qwen2_moe", LLAMA_LIKE | EXPERTS, ("experts",)),
        ("deepseek_v3", LLAMA_LIKE | DEEPSEEK, ("experts",)),
        ("llama", LLAMA_LIKE, ("1.mlp.up_proj",)),
    ],
)
def test_plain_transformers_packs_the_same_matrices_under_the_adapters_settings(
    model_type: str, settings: dict[str, Any], skip: tuple[str, ...], tmp_path: Path
) -> None:
    """Source: transformers' ``load_in_4bit`` under the settings that the adapter folder holds."""
    from transformers import AutoModelForCausalLM

    folder = Family(model_type, model_type, settings, (), 0).save(tmp_path / "base")
    config = QuantizationConfig(skip_modules=skip, compute_dtype="float32", cache=False)
    plan = plan_quantization(build_skeleton(folder), config)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bitsandbytes_config(config, torch.float32, plan)
    )
    assert packed_modules(plain) == owners(plan.quantized)
    assert packed_modules(plain) == packed_modules(load(folder, skip_modules=skip).model)


def test_what_a_family_keeps_in_float32_is_not_packed(tmp_path: Path, monkeypatch: Any) -> None:
    """Source: plain transformers, which leaves ``_keep_in_fp32_modules`` alone."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    folder = Family("LLaMA", "llama", LLAMA_LIKE, (), 0).save(tmp_path / "base")
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["o_proj"])
    plan = plan_quantization(build_skeleton(folder), NF4)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bitsandbytes_config(NF4, torch.float32, plan)
    )
    assert packed_modules(plain) == owners(plan.quantized)
    assert len(plan.quantized) == 12
    assert plan.kept["model.layers.0.self_attn.o_proj.weight"] == "linear"


def test_kept_matrices_of_a_plan_are_all_and_nothing_but_the_rest(tmp_path: Path) -> None:
    skeleton, experts, _ = mixture("qwen2_moe", tmp_path)
    plan: QuantizationPlan = plan_quantization(
        skeleton, QuantizationConfig(skip_modules=(*experts, "k_proj"))
    )
    everything = [name for name, _, _ in matrices(skeleton)]
    assert sorted([*plan.quantized, *plan.kept]) == sorted(everything)
    targets = resolve_targets(skeleton, LORA)
    kept_linears = {name for name, role in plan.kept.items() if role == "linear"}
    assert set(targets) == owners(plan.quantized) | owners(kept_linears)
    assert all(
        re.fullmatch(r"model\.layers\.\d\.self_attn\.k_proj\.weight", n) for n in kept_linears
    )
