"""A plain adapter says what the original says to programs that read alpha / r and nothing else.

Source of every expected logit: PEFT, over the same base, in float64.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_runs import PARTS, fill, logits_of
from conftest import save_base
from families import Saver
from safetensors.torch import load_file, save_file

from qlora_pl.errors import ConfigurationError
from qlora_pl.exporting.plain_adapter import plain_adapter
from qlora_pl.modeling.folders.adapter_folder import read_adapter_folder

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]

RSLORA = {"use_rslora": True}
PATTERNS = {
    "rank_pattern": {"q_proj": 8, r"model.layers.1.mlp.\w+": 2},
    "alpha_pattern": {"v_proj": 2, "layers.0.mlp.down_proj": 40},
}
KINDS: dict[str, dict[str, Any]] = {
    "rank-stabilised": RSLORA,
    "ranks": {"rank_pattern": PATTERNS["rank_pattern"]},
    "alphas": {"alpha_pattern": PATTERNS["alpha_pattern"]},
    "all of it": RSLORA | PATTERNS,
}


def base_in_float64(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of PEFT's own making, every matrix off its start."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": PARTS, "task_type": "CAUSAL_LM"} | settings
    )
    model = peft.get_peft_model(base_in_float64(base).float(), config)
    fill(model)
    model.save_pretrained(folder)
    return folder


def answers(base: Path, folder: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(base_in_float64(base), folder).double()
    return logits_of(model)


def reader_of_alpha_over_r(base: Path, folder: Path) -> torch.Tensor:
    """What a program makes of it that knows one scale: lora_alpha over each A's own rows."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = base_in_float64(base)
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")].double()
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = b @ a.double() * settings["lora_alpha"] / a.shape[0]
            model.get_submodule(module).weight.data += delta
    return logits_of(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_adapter_gives_the_logits_of_the_original(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    """1e-6 of logits of about 5: B times its scale is rounded to float32 once."""
    original = save_adapter(tiny_base, tmp_path / "original", **KINDS[kind])
    plain = plain_adapter(original)
    assert plain.is_changed
    (tmp_path / "plain").mkdir()
    plain.write(tmp_path / "plain")
    expected = answers(tiny_base, original)
    assert (answers(tiny_base, tmp_path / "plain") - expected).abs().max() < 1e-6
    simple = reader_of_alpha_over_r(tiny_base, tmp_path / "plain")
    assert (simple - expected).abs().max() < 1e-6
    if kind != "ranks":  # the same reader of the original is wrong, or this would prove nothing
        assert (reader_of_alpha_over_r(tiny_base, original) - expected).abs().max() > 1e-2
    settings = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert settings["lora_alpha"] == settings["r"] == plain.rank
    assert not settings["use_rslora"]
    assert {t.shape[0] for n, t in plain.tensors.items() if "lora_A" in n} == {plain.rank}


def test_an_adapter_that_is_plain_already_stays_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    original = save_adapter(tiny_base, tmp_path / "original")
    plain = plain_adapter(original)
    assert not plain.is_changed
    assert (plain.config["r"], plain.config["lora_alpha"]) == (4, 6)
    own = load_file(original / "adapter_model.safetensors")
    assert plain.tensors.keys() == own.keys()
    assert all(torch.equal(plain.tensors[name], tensor) for name, tensor in own.items())


def test_gpt_2_s_transposed_layers_are_resolved_too(saved: Saver, tmp_path: Path) -> None:
    base = saved("GPT-2")
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    original = save_adapter(base, tmp_path / "original", **RSLORA, **settings)
    (tmp_path / "plain").mkdir()
    plain_adapter(original).write(tmp_path / "plain")
    apart = answers(base, tmp_path / "plain") - answers(base, original)
    assert apart.abs().max() < 1e-6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "is a DoRA, which rescales rows of the base"),
    "biases": ({"bias": "all"}, "brings trained biases"),
    "biases of B": ({"lora_bias": True}, "brings trained biases"),
    "rows": (
        {"trainable_token_indices": [3, 4]},
        "changes the base itself ('model.embed_tokens.token_adapter.trainable_tokens_delta')",
    ),
    "whole modules": (
        {"modules_to_save": ["lm_head"]},
        "changes the base itself ('lm_head.weight')",
    ),
    "embedding": ({"target_modules": ["embed_tokens"]}, "changes the base itself"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_matrices_is_refused_with_a_way_out(kind: str, tmp_path: Path) -> None:
    settings, clause = REFUSED[kind]
    base = save_base(tmp_path / "base", attention_bias=True)
    folder = save_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(ConfigurationError) as error:
        plain_adapter(folder)
    assert clause in str(error.value)
    assert "export it merged into its base (--form merged)" in str(error.value)


def test_experts_that_are_no_matrices_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_base, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"target_parameters": ["mlp.experts.gate_up_proj"]}
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match="adapts parameters that are no matrices"):
        plain_adapter(folder)


def test_a_grown_vocabulary_is_refused(adapter: Path) -> None:
    """Its own base has no rows for the new tokens."""
    manifest = read_adapter_folder(adapter)
    assert plain_adapter(adapter, manifest).rank == 8
    grown = replace(manifest, vocabulary_size=600)
    with pytest.raises(ConfigurationError, match="belongs to a base of 600 tokens, not its own"):
        plain_adapter(adapter, grown)


def test_a_bfloat16_adapter_is_scaled_in_more_than_its_own_bits(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Scaled in bfloat16, B would be rounded a second time, to 8 bits."""
    original = save_adapter(tiny_base, tmp_path / "original", use_rslora=True, r=3)
    path = original / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    (tmp_path / "plain").mkdir()
    plain = plain_adapter(original)
    plain.write(tmp_path / "plain")
    assert {tensor.dtype for tensor in plain.tensors.values()} == {torch.float32}
    apart = answers(tiny_base, tmp_path / "plain") - answers(tiny_base, original)
    assert apart.abs().max() < 1e-6
