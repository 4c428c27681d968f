"""What is loaded is what was asked for, matrix by matrix, or one sentence says why not.

bitsandbytes' real NF4 and FP4 run on this CPU; transformers' own loader and the tensors of the file
are the sources of expected values.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import save_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.base.structure import head_name, linear_names, matrices
from qlora_pl.modeling.loading.base_loading import (
    LoadedBase,
    load_base,
    packed_folder,
    prepare_for_training,
)
from qlora_pl.modeling.steps.loss import causal_lm_loss

CPU = torch.device("cpu")
IN_LAYER = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
LLAMA_LINEARS = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in IN_LAYER]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def load(folder: Path, trust: bool = False, **settings: Any) -> LoadedBase:
    config = QuantizationConfig(**{"cache": False} | settings)
    identity = identify_base(str(folder), None, None)
    plan = plan_quantization(build_skeleton(folder, trust_remote_code=trust), config)
    return load_base(identity, config, plan, device=CPU, trust_remote_code=trust)


def quantized_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 35).reshape(2, 16)).logits


def make_batch() -> dict[str, Tensor]:
    ids = torch.arange(5, 37).reshape(2, 16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what is packed -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_linear_is_packed_and_head_and_embeddings_are_not(tmp_path, tied):
    """The names are LLaMA's, written down by hand."""
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    model = load(base).model
    assert quantized_modules(model) == LLAMA_LINEARS
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    stored = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, stored)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_weights_are_bitsandbytes_own_of_the_files_tensors(
    tiny_base, quant_type, double_quant
):
    """Source: bitsandbytes.functional.quantize_4bit of the tensors in the file."""
    model = load(tiny_base, quant_type=quant_type, double_quant=double_quant).model
    for name, tensor in load_file(tiny_base / "model.safetensors").items():
        if name.removesuffix(".weight") in LLAMA_LINEARS:
            packed, state = bnb.quantize_4bit(
                tensor, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
            )
            weight = model.get_parameter(name)
            assert torch.equal(weight.data.flatten(), packed.flatten())
            assert torch.equal(weight.quant_state.absmax, state.absmax)
            assert weight.quant_state.quant_type == quant_type
            assert weight.quant_state.nested is double_quant


def test_an_unquantised_base_is_what_transformers_loads(tiny_base):
    from transformers import AutoModelForCausalLM

    loaded = load(tiny_base, quant_type="none", compute_dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    assert quantized_modules(loaded.model) == []
    assert torch.equal(logits(loaded.model), logits(plain))


def test_the_head_keeps_its_role_on_the_meta_device_and_when_tied(tmp_path):
    for tied in (False, True):
        save_base(tmp_path / str(tied), tie_word_embeddings=tied)
        skeleton = build_skeleton(tmp_path / str(tied))
        assert all(parameter.is_meta for parameter in skeleton.parameters())
        assert head_name(skeleton) == "lm_head"
        assert linear_names(skeleton) == LLAMA_LINEARS
        others = {name: role for name, _, role in matrices(skeleton) if role != "linear"}
        untied = {} if tied else {"lm_head.weight": "head"}
        assert others == {"model.embed_tokens.weight": "embedding"} | untied


def test_gpt2s_transposed_matrices_are_packed_and_compute_the_same(tmp_path):
    """Source: the unquantised model with the same dequantised weights, in float32.

    2e-5: float32 sums of 64 to 256 products in another order, at logits of about 1.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, n_positions=64)
    config.bos_token_id = config.eos_token_id = 1
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    packed = load(tmp_path / "gpt2", compute_dtype="float32")
    plain = load(tmp_path / "gpt2", quant_type="none", compute_dtype="float32")
    assert len(quantized_modules(packed.model)) == 8
    for name in packed.plan.quantized:
        weight = packed.model.get_parameter(name)
        values = bnb.dequantize_4bit(weight.data, weight.quant_state)
        target = plain.model.get_parameter(name)
        target.data = values.t() if values.shape != target.shape else values
        if values.shape[0] == values.shape[1]:  # attention's c_proj: the shape does not tell
            target.data = values.t()
    torch.testing.assert_close(logits(packed.model), logits(plain.model), rtol=0, atol=2e-5)


def test_subclasses_of_linear_are_packed_though_transformers_passes_over_them(
    tmp_path, monkeypatch
):
    """Its loader packs ``nn.Linear`` alone, and Falcon's are subclasses."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    loaded = load(tmp_path / "falcon")
    assert len(quantized_modules(loaded.model)) == 8
    assert loaded.plan.replaced_classes == (
        "transformers.models.falcon.modeling_falcon.FalconLinear",
    )
    # without the project's own replacement the load fails by name, instead of going on in 16 bits
    monkeypatch.setattr(
        "qlora_pl.modeling.loading.base_loading.planned_replacement",
        lambda *_: contextlib.nullcontext(),
    )
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path / "falcon")
    assert "8 of 8 weight matrices are not nf4 after loading" in str(caught.value)
    assert "transformer.h.0.self_attention.query_key_value.weight" in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_mixtures_router_is_left_alone_and_its_fused_experts_are_refused_by_name(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=512,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(
        ConfigurationError, match="holds fused experts and cannot be quantised"
    ) as caught:
        load(tmp_path / "mixtral")
    assert "model.layers.0.mlp.experts" in str(caught.value)
    loaded = load(tmp_path / "mixtral", skip_modules=("experts",))
    assert loaded.plan.kept["model.layers.0.mlp.gate.weight"] == "router"
    assert len(quantized_modules(loaded.model)) == 4  # attention


# --- skip_modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skipped", "kept"),
    [
        (("down_proj",), ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        (("1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
        (
            ("model.layers.0.self_attn.q_proj", "o_proj"),
            [LLAMA_LINEARS[0], LLAMA_LINEARS[3], LLAMA_LINEARS[10]],
        ),
    ],
)
def test_skipped_modules_stay_in_16_bits_and_the_rest_is_packed(tiny_base, skipped, kept):
    loaded = load(tiny_base, skip_modules=skipped, compute_dtype="bfloat16")
    model = loaded.model
    assert quantized_modules(model) == [name for name in LLAMA_LINEARS if name not in kept]
    stored = load_file(tiny_base / "model.safetensors")
    for name in kept:
        assert torch.equal(model.get_parameter(f"{name}.weight"), stored[f"{name}.weight"])
        assert loaded.plan.kept[f"{name}.weight"] == "linear"


def test_a_misspelt_entry_of_skip_modules_is_refused(tiny_base):
    with pytest.raises(ConfigurationError, match=r"skip_modules: .* belongs to q_porj;"):
        load(tiny_base, skip_modules=("q_porj", "v_proj"))


# --- the packed copy ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quant_type": "fp4", "double_quant": False},
        {"compute_dtype": "float32"},
        {"skip_modules": ("down_proj",)},
        {"skip_modules": tuple(LLAMA_LINEARS[:12])},  # together longer than a file name may be
        {"storage_dtype": "bfloat16"},
    ],
    ids=["nf4", "fp4", "float32", "skip", "many-skipped", "storage"],
)
def test_the_packed_copy_reloads_bit_for_bit(tiny_base, cache, settings):
    made = load(tiny_base, cache=True, **settings)
    read = load(tiny_base, cache=True, **settings)
    assert (made.is_from_cache, read.is_from_cache) == (False, True)
    for name in made.plan.quantized:
        a, b = made.model.get_parameter(name), read.model.get_parameter(name)
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for x, y in zip(statistics(a), statistics(b), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
    assert torch.equal(logits(made.model), logits(read.model))
    dtypes = [{n: p.dtype for n, p in m.model.named_parameters()} for m in (made, read)]
    assert dtypes[0] == dtypes[1]


def statistics(weight: Any) -> list[Tensor]:
    state = weight.quant_state
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]


def test_a_tied_head_stays_tied_in_the_packed_copy(tmp_path, cache):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    load(base, cache=True)
    read = load(base, cache=True)
    assert read.is_from_cache
    assert read.model.lm_head.weight is read.model.model.embed_tokens.weight


def test_the_packed_copy_is_another_under_another_quantisation(tiny_base, cache):
    load(tiny_base, cache=True)
    for settings in [
        {"quant_type": "fp4"},
        {"double_quant": False},
        {"compute_dtype": "float16"},
        {"storage_dtype": "bfloat16"},
        {"skip_modules": ("q_proj",)},
        {"skip_modules": ("k_proj",)},
    ]:
        assert not load(tiny_base, cache=True, **settings).is_from_cache, settings
    assert load(tiny_base, cache=True).is_from_cache


def test_the_packed_copy_is_not_used_for_another_base(base, cache):
    load(base, cache=True)
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (base / "model.safetensors").write_bytes(data)
    assert not load(base, cache=True).is_from_cache
    change_config(base, rms_norm_eps=1e-5)
    assert not load(base, cache=True).is_from_cache


def test_a_byte_changed_in_any_file_of_the_packed_copy_makes_it_anew(tiny_base, cache, caplog):
    load(tiny_base, cache=True)
    (packed,) = (cache / "packed").iterdir()
    names = sorted(path.name for path in packed.iterdir())
    assert "tensors-00001.safetensors" in names
    for name in names:
        path = packed / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        assert not load(tiny_base, cache=True).is_from_cache, name
        assert "was altered since it was written" in caplog.text
        assert load(tiny_base, cache=True).is_from_cache
        path.unlink()
        assert not load(tiny_base, cache=True).is_from_cache, name


def test_no_copy_is_kept_that_was_not_asked_for(tiny_base, cache):
    load(tiny_base)
    load(tiny_base, quant_type="none", cache=True)
    assert not (cache / "packed").exists()


def test_a_full_disk_costs_the_packed_copy_and_not_the_run(tiny_base, cache, caplog):
    """Source: the kernel's own EFBIG (RLIMIT_FSIZE), in the middle of writing the weights."""
    with files_no_larger_than(16_384):
        loaded = load(tiny_base, cache=True)
    assert quantized_modules(loaded.model) == LLAMA_LINEARS
    assert "The packed weights were not kept" in caplog.text
    assert list((cache / "packed").iterdir()) == []
    assert not load(tiny_base, cache=True).is_from_cache


@contextmanager
def files_no_larger_than(size: int):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_another_process_that_was_faster_is_as_good(tiny_base, cache, monkeypatch, caplog):
    """The faster one is this process itself, called while the slower one writes."""
    import safetensors.torch

    save, calls = safetensors.torch.save_file, []

    def slow_save(tensors: Any, path: Any) -> None:
        save(tensors, path)
        calls.append(path)
        if len(calls) == 1:
            assert not load(tiny_base, cache=True).is_from_cache

    monkeypatch.setattr(safetensors.torch, "save_file", slow_save)
    load(tiny_base, cache=True)
    assert len(calls) == 2
    assert "not kept" not in caplog.text
    assert len(list((cache / "packed").iterdir())) == 1
    assert load(tiny_base, cache=True).is_from_cache


def test_the_packed_folders_name_tells_one_list_of_skipped_modules_from_another(tiny_base):
    identity = identify_base(str(tiny_base), None, None)
    names = {
        packed_folder(
            identity, QuantizationConfig(skip_modules=skip), torch.bfloat16, CPU, None
        ).name
        for skip in [(), ("a",), ("a", "b"), ("a-b",), ("b",)]
    }
    assert len(names) == 5
    assert max(map(len, names)) < 100


# --- bases that are not loaded --------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
@pytest.mark.parametrize(
    "missing", ["model.layers.1.mlp.up_proj", "model.layers.0.input_layernorm", "lm_head"]
)
def test_a_base_that_lacks_a_weight_is_refused_by_name(base, quant_type, missing):
    tensors = load_file(base / "model.safetensors")
    tensors.pop(f"{missing}.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError) as caught:
        load(base, quant_type=quant_type)
    assert f"1 of the weights its config.json asks for ({missing}.weight)" in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"intermediate_size": 256}, "mlp"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj"),
        ({"vocab_size": 640}, "lm_head"),
    ],
)
def test_a_config_json_of_another_model_is_refused_by_name(base, quant_type, changes, named):
    """Its loader packs a matrix of whatever shape the file holds, without comparing."""
    change_config(base, **changes)
    with pytest.raises(ConfigurationError, match=named) as caught:
        load(base, quant_type=quant_type)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "unheard_of"}, "cannot build a causal language model"),
        ({"model_type": "vit"}, "cannot build a causal language model"),
    ],
)
def test_what_is_no_causal_language_model_is_one_sentence(base, config, words):
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=words) as caught:
        build_skeleton(base)
    assert "\n" not in str(caught.value)


def test_widths_that_blocks_do_not_divide_are_refused(tmp_path):
    base = save_base(
        tmp_path / "base", hidden_size=48, num_attention_heads=4, intermediate_size=128
    )
    with pytest.raises(ConfigurationError) as caught:
        load(base)
    assert "'model.layers.0.self_attn.q_proj.weight' has 48 inputs" in str(caught.value)
    skipped = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    assert len(quantized_modules(load(base, skip_modules=skipped).model)) == 2


def test_code_in_the_folder_runs_only_where_it_is_trusted(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    (base / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    names = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    change_config(base, model_type="own", auto_map=names)
    with pytest.raises(ConfigurationError, match="brings Python code of its own"):
        load(base)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    made, read = (load(base, trust=True, cache=True) for _ in range(2))
    assert (made.is_from_cache, read.is_from_cache) == (False, True)
    assert type(read.model).__name__ == "OwnModel"
    assert quantized_modules(read.model) == LLAMA_LINEARS


def test_a_bit_that_rots_leaves_size_and_time_alone_and_is_noticed(tiny_base, cache):
    load(tiny_base, cache=True)
    (weights,) = cache.glob("packed/*/tensors-00001.safetensors")
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert not load(tiny_base, cache=True).is_from_cache
    assert load(tiny_base, cache=True).is_from_cache


# --- ready to train -------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapters", ["float32", "bfloat16"])
def test_every_tensor_has_the_type_that_was_asked_for(tiny_base, compute, adapters):
    loaded = load(tiny_base, compute_dtype=compute)
    model = attach_adapters(loaded.model, LoRAConfig(r=4, dtype=adapters), seed=0)
    assert loaded.compute_dtype == getattr(torch, compute)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == getattr(torch, adapters), name
        elif name.endswith("base_layer.weight"):
            assert parameter.dtype == torch.uint8, name
        else:
            assert parameter.dtype == getattr(torch, compute), name
    buffers = dict(model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    assert logits(model).dtype == getattr(torch, compute)


def test_nothing_of_the_base_is_trainable(tiny_base):
    for quant_type in ("nf4", "none"):
        model = load(tiny_base, quant_type=quant_type).model
        assert not any(parameter.requires_grad for parameter in model.parameters())


def forwards_in_a_step(model: nn.Module, module: nn.Module) -> int:
    calls = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    causal_lm_loss(model, make_batch()).total.backward()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_gradient_checkpointing_computes_each_layer_again_and_only_then(
    tiny_base, gradient_checkpointing
):
    loaded = load(tiny_base).model
    model = attach_adapters(loaded, LoRAConfig(r=4, dropout=0.5), seed=0)
    prepare_for_training(model, gradient_checkpointing)
    for layer in loaded.model.layers:
        assert forwards_in_a_step(model, layer.self_attn) == 1 + gradient_checkpointing
    assert model.config.use_cache is False


def test_everything_is_in_training_mode_so_that_dropout_works(tiny_base):
    model = attach_adapters(load(tiny_base).model, LoRAConfig(r=4, dropout=0.5), seed=0)
    assert not any(module.training for module in model.get_base_model().model.layers)
    prepare_for_training(model, gradient_checkpointing=False)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    first, second = (causal_lm_loss(model, make_batch()).total for _ in range(2))
    assert first != second


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_from_cache", [False, True])
def test_gradients_are_the_same_before_and_after_a_forward_without_gradients(
    tiny_base, compute, is_from_cache, gradient_checkpointing
):
    """On CPUs with AVX512-BF16 bitsandbytes would repack the weights in that forward, in place.

    Equal in every bit: the same operations on the same numbers.
    """
    cached = [load(tiny_base, compute_dtype=compute, cache=True) for _ in range(2)]
    assert cached[1].is_from_cache
    loaded = cached[1] if is_from_cache else load(tiny_base, compute_dtype=compute)
    model = attach_adapters(loaded.model, LoRAConfig(r=4), seed=0)
    prepare_for_training(model, gradient_checkpointing)
    before = lora_b_gradients(model)
    assert all(gradient.any() for gradient in before.values())
    logits(model)
    model.train()
    after = lora_b_gradients(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def lora_b_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    causal_lm_loss(model, make_batch()).total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if "lora_B" in n}
