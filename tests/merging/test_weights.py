"""Merged matrices are those of PEFT's own merging, over the matrix that each policy names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import IDS, fit, twin_of
from adapter_runs import load as load_small
from conftest import save_base
from families import Saver
from transformers import AutoModelForCausalLM

from qlora_pl.inference.loading import add_adapter, load
from qlora_pl.inference.source import ModelChoice, ModelSource, resolve_source
from qlora_pl.merging.candidates import Form, write_candidate
from qlora_pl.merging.requantizing import plan_packing
from qlora_pl.merging.weights import MergedWeights
from qlora_pl.merging.writing import write_shards
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.loading.base_loading import keep_gradients_on_cpu

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
    write_shards(folder, ({name: t} for name, t in weights.tensors(policy, dtype)), 200_000)
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
    """2e-5 of logits of about 1, as in tests/modeling/test_families.py; all of it in float32.

    Written in bfloat16, every weight is rounded by up to 2^-9 of itself. The largest logit moves by
    up to 2^-7 of itself, four times that, for a dozen products in a row (0.0055 was seen).
    """
    base = saved(family)
    module = fit(tmp_path / "run", base, rows_file, r=4)
    expected = logits(module.model)
    model = written(tmp_path / "run/adapter", tmp_path / "merged", "dequantized")
    assert (logits(model) - expected).abs().max() < 2e-5
    rounded = written(tmp_path / "run/adapter", tmp_path / "half", "dequantized", torch.bfloat16)
    parted = (logits(rounded.float()) - expected).abs().max() / expected.abs().max()
    assert 1e-6 < parted < 2**-7
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


def test_shards_are_full_and_in_order(tmp_path: Path) -> None:
    """Groups of 24, 20, 80 and 4 bytes in files of at most 40: only the third is larger."""
    groups = [{name: torch.zeros(size)} for name, size in (("a", 6), ("b", 5), ("c", 20))]
    groups.append({"d": torch.zeros(1), "d.scale": torch.zeros(1)})
    (tmp_path / "several").mkdir()
    assert write_shards(tmp_path / "several", groups, 40) == 132
    index = json.loads((tmp_path / "several/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00004.safetensors",
        "b": "model-00002-of-00004.safetensors",
        "c": "model-00003-of-00004.safetensors",
        "d": "model-00004-of-00004.safetensors",
        "d.scale": "model-00004-of-00004.safetensors",
    }
    assert {path.name for path in (tmp_path / "several").iterdir()} == {
        *index["weight_map"].values(),
        "model.safetensors.index.json",
    }
    (tmp_path / "one").mkdir()
    write_shards(tmp_path / "one", groups, 1000)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]


def test_a_base_stored_more_exactly_than_its_config_says_is_rounded_once(
    rows_file: Path, tmp_path: Path
) -> None:
    """As training reads it: from the files' float32, not by way of the float16 of config.json."""
    base = save_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    model.save_pretrained(base)
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    module = fit(tmp_path / "run", base, rows_file, r=4)
    merged = written(tmp_path / "run/adapter", tmp_path / "merged", "dequantized")
    assert (logits(merged) - logits(module.model)).abs().max() < 2e-5
    _, weights = merging(tmp_path / "run/adapter")
    plain = dict(model.state_dict())
    weights.name = None
    for place in weights._places():
        assert torch.equal(place.tensor, plain[place.name]), place.name


@pytest.mark.parametrize("family", ["LLaMA", "GPT-2", "BLOOM", "T5"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_is_packed_again_is_what_transformers_packs_of_the_merged_model(
    family: str, quant_type: Any, saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    """Source: transformers' own packing while it loads the 16-bit folder, to the bit."""
    fit(tmp_path / "run", saved(family), rows_file, r=4, compute="bfloat16")
    merged = written(tmp_path / "run/adapter", tmp_path / "merged", "original", torch.bfloat16)
    source, weights = merging(tmp_path / "run/adapter")
    packing = plan_packing(weights.skeleton, quant_type)
    form = Form(dtype=torch.bfloat16, packing=packing)
    write_candidate(tmp_path / "packed", weights, source, "original", form)
    kind = type(merged)
    ours = kind.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    theirs = kind.from_pretrained(
        tmp_path / "merged",
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=packing.settings(torch.bfloat16),
    )
    assert config["bnb_4bit_quant_type"] == quant_type
    for model in (ours, theirs):
        keep_gradients_on_cpu(model)
    kinds = [{n: type(m).__name__ for n, m in model.named_modules()} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]
    assert "Linear4bit" in kinds[0].values()
    assert torch.equal(logits(ours), logits(theirs))
    own, other = ours.state_dict(), theirs.state_dict()
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, other[name]), name
    total = sum(p.stat().st_size for p in (tmp_path / "packed").glob("model*.safetensors"))
    foreseen = sum(form.num_bytes(name, number) for name, number in weights.sizes())
    assert total < foreseen + 3000 * len(packing.plan.quantized) + 10_000  # tables of each matrix
