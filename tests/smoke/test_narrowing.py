"""What is kept of an architecture, and what becomes less, held against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.sharding import unit_names
from qlora_pl.planning.shapes.known_shapes import known_names, known_shape
from qlora_pl.smoke.narrowing import WIDEST, narrow
from qlora_pl.smoke.random_base import WEIGHT_STD

NAMES = known_names()


def settings(name: str, **changes: Any) -> dict[str, Any]:
    return AutoConfig.for_model(**known_shape(name) | changes).to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_narrowed_base_is_of_its_family_and_can_be_packed(name: str, tmp_path: Path) -> None:
    """Built by transformers, on the meta device, from the settings alone."""
    old = settings(name)
    new = narrow(old).config
    assert new["model_type"] == old["model_type"]
    assert new["vocab_size"] == old["vocab_size"]
    assert new.get("tie_word_embeddings") == old.get("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(new))
    skeleton = build_skeleton(tmp_path)
    assert plan_quantization(
        skeleton, QuantizationConfig()
    ).quantized  # refuses rows that do not fit
    embedding = skeleton.get_input_embeddings().weight  # type: ignore[operator]
    assert embedding.shape[0] == old["vocab_size"]
    assert max(embedding.shape[1], skeleton.config.hidden_size) <= WIDEST
    layers = [name for name in unit_names(skeleton) if name.rpartition(".")[2].isdigit()]
    assert len(layers) == (4 if skeleton.config.is_encoder_decoder else 2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        # heads, key and value heads, size of a head, hidden size
        ("llama-65b", (4, 4, 128, 512)),
        ("mistral-7b", (4, 1, 128, 512)),
        ("llama3-70b", (8, 1, 128, 512)),  # 8 queries to a key: wider than the hidden size
        ("smollm2-135m", (6, 2, 64, 384)),
        ("qwen2.5-7b", (7, 1, None, 448)),  # 7 queries to a key leave heads of 64
        ("gemma-7b", (2, 2, 256, 512)),
        ("t5-v1_1-xl", (8, None, 64, 512)),
        ("falcon-40b", (16, 1, None, 512)),  # 16 queries to a key leave heads of 32
        ("bloom-7b1", (4, None, None, 512)),
    ],
)
def test_heads_keep_their_size_and_their_number_of_queries_to_a_key(
    name: str, shape: tuple[int | None, ...]
) -> None:
    new = narrow(settings(name)).config
    heads = next(new[key] for key in ("num_attention_heads", "n_head", "num_heads") if key in new)
    keys = new.get("num_key_value_heads", new.get("num_kv_heads"))
    size = new.get("head_dim", new.get("d_kv"))
    hidden = next(new[key] for key in ("hidden_size", "d_model") if key in new)
    assert (heads, keys, size, hidden) == shape


def test_what_was_narrowed_is_listed() -> None:
    changes = narrow(settings("llama-65b")).changes
    assert "num_hidden_layers: 2 of 80" in changes
    assert "hidden_size: 512 of 8,192" in changes
    assert "intermediate_size: 1,408 of 22,016" in changes  # 1,376 is no multiple of 64
    assert "num_attention_heads: 4 of 64" in changes
    assert not any(change.startswith("head_dim") for change in changes)


def test_a_base_that_is_small_already_loses_layers_alone() -> None:
    old = settings("pythia-70m")
    assert narrow(old).changes == ["num_hidden_layers: 2 of 6"]


def test_layers_of_both_kinds_are_left() -> None:
    """Gemma 3 has five layers that look back a little for one that looks back to the start."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 4
    old = AutoConfig.for_model("gemma3_text", num_hidden_layers=24, layer_types=kinds).to_dict()
    assert narrow(old).config["layer_types"] == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("block", [64, 128, 256, 512])
def test_rows_hold_whole_blocks(block: int) -> None:
    new = narrow(settings("llama-7b"), block).config
    assert new["hidden_size"] % block == 0
    assert new["intermediate_size"] % block == 0


def test_settings_that_do_not_say_how_wide_the_model_is_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not say how wide it is"):
        narrow({"model_type": "odd", "num_layers": 4})
    with pytest.raises(ConfigurationError, match="does not say how many layers it has"):
        narrow({"model_type": "odd"})


def test_random_weights_let_two_layers_answer_to_their_input() -> None:
    """A product of a row of 512 such weights with numbers of size 1 is of size 1 as well."""
    assert 0.5 < WEIGHT_STD * 512**0.5 < 2
