"""Merged matrices are those of PEFT's own merging, over the matrix that each policy names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import IDS, fit, twin_of
from adapter_runs import load as load_small
from conftest import save_base
from families import Saver

from qlora_pl.inference.loading import add_adapter, load
from qlora_pl.inference.source import ModelChoice, ModelSource, resolve_source
from qlora_pl.merging.weights import MergedWeights
from qlora_pl.merging.writing import plan_shards, write_shards
from qlora_pl.modeling.identity import identify_base

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

CPU = torch.device("cpu")


def merging(adapter: Path) -> tuple[ModelSource, MergedWeights]:
    source = resolve_source(ModelChoice(adapter=(str(adapter),)))
    return source, MergedWeights(source, identify_base(source.base, None, None))


def written(adapter: Path, folder: Path, policy: Any, dtype: Any = torch.float32) -> Any:
    """What plain transformers loads of what was written."""
    import transformers

    source, weights = merging(adapter)
    folder.mkdir()
    size = torch.empty(0, dtype=dtype).element_size()
    files = plan_shards([(name, number * size) for name, number in weights.sizes()], 200_000)
    write_shards(folder, files, weights.tensors(policy, dtype))
    weights.base.config.save_pretrained(folder)
    kind = source.manifest.auto_class if source.manifest else "AutoModelForCausalLM"
    model, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def logits(model: Any) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs, use_cache=False).logits
    return found


FAMILIES = ["LLaMA", "BLOOM", "Falcon (rotary)", "GPT-NeoX, Pythia", "GPT-2", "OPT", "T5", "Gemma"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_merged_onto_the_4_bit_base_gives_the_trained_model_s_logits(
    family: str, saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    """2e-5 of logits of about 1, as in tests/modeling/test_families.py; all of it in float32."""
    base = saved(family)
    module = fit(tmp_path / "run", base, rows_file, r=4)
    expected = logits(module.model)
    model = written(tmp_path / "run/adapter", tmp_path / "merged", "dequantized")
    assert (logits(model) - expected).abs().max() < 2e-5
    other = written(tmp_path / "run/adapter", tmp_path / "other", "original")
    assert (logits(other) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dora"},
        {"method": "dora", "bias": "lora_only"},
        {"use_rslora": True},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 2}},
        {"quant_type": "int8"},
        {"quant_type": "fp4"},
    ],
    ids=str,
)
def test_every_kind_of_adapter_is_merged(
    changes: dict[str, Any], rows_file: Path, tmp_path: Path
) -> None:
    """int8 to 1e-2, since its products round their inputs to 8 bits as well."""
    base = save_base(tmp_path / "base", attention_bias=True)
    module = fit(tmp_path / "run", base, rows_file, **{"r": 4} | changes)
    expected = logits(module.model)
    model = written(tmp_path / "run/adapter", tmp_path / "merged", "dequantized")
    bound = 0.1 if "int8" in changes.values() else 2e-5
    assert (logits(model) - expected).abs().max() < bound


@pytest.mark.parametrize("family", ["LLaMA", "GPT-2"])
def test_what_is_merged_onto_the_original_is_peft_s_own_merge(
    family: str, saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = saved(family)
    fit(tmp_path / "run", base, rows_file, r=4)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft_model, _ = add_adapter(plain, tmp_path / "run/adapter", "default", torch.float32)
    theirs = peft_model.merge_and_unload()  # type: ignore[operator]
    ours = written(tmp_path / "run/adapter", tmp_path / "merged", "original")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_tied_heads_stay_tied(rows_file: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    fit(tmp_path / "run", base, rows_file, r=4)
    _, weights = merging(tmp_path / "run/adapter")
    names = [name for name, _ in weights.sizes()]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model = written(tmp_path / "run/adapter", tmp_path / "merged", "dequantized")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bfloat16_rounds_what_was_computed_in_float32(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    fit(tmp_path / "run", tiny_base, rows_file, r=4)
    _, weights = merging(tmp_path / "run/adapter")
    exact = dict(weights.tensors("dequantized", torch.float32))
    for name, tensor in weights.tensors("dequantized", torch.bfloat16):
        assert torch.equal(tensor, exact[name].to(torch.bfloat16))


def test_the_round_trip_is_what_the_loaded_base_decodes_to(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Source: bitsandbytes' own decoding of the base as training loads it, in bfloat16."""
    loaded = load_small(tiny_base, compute="bfloat16")
    twin = twin_of(loaded, tiny_base).state_dict()
    fit(tmp_path / "run", tiny_base, rows_file, r=4, compute="bfloat16")
    source, weights = merging(tmp_path / "run/adapter")
    weights.name = None  # the base alone
    for place in weights._places():
        if place.name in loaded.plan.quantized:
            found = weights._merged(place._replace(wrapper=None), "dequantized")
            assert torch.equal(found, twin[place.name].float()), place.name
    assert load(source, CPU)


def test_shards_are_full_and_in_order() -> None:
    sizes = [("a", 60), ("b", 50), ("c", 200), ("d", 10)]
    assert plan_shards(sizes, 100) == {
        "a": "model-00001-of-00004.safetensors",
        "b": "model-00002-of-00004.safetensors",
        "c": "model-00003-of-00004.safetensors",
        "d": "model-00004-of-00004.safetensors",
    }
    assert set(plan_shards(sizes, 1000).values()) == {"model.safetensors"}
