"""Layers and kinds of modules, told from the names of every supported family."""

from __future__ import annotations

import pytest
from families import FAMILIES, Family
from transformers import AutoConfig

from qlora_pl.inspection.places import in_order, place_modules

LLAMA = [f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "o_proj")]


def test_the_first_number_is_the_layer_and_the_end_is_the_kind() -> None:
    places = place_modules(LLAMA)
    assert places["model.layers.1.self_attn.o_proj"] == ("1", "o_proj")


def test_a_last_part_that_means_two_things_is_told_apart() -> None:
    """GPT-2 calls two of its matrices c_proj."""
    places = place_modules(
        ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc"]
    )
    assert [place.kind for place in places.values()] == ["attn.c_proj", "mlp.c_proj", "c_fc"]


def test_experts_share_the_place_of_their_kind() -> None:
    names = [f"model.layers.3.mlp.experts.{i}.up_proj" for i in range(2)]
    assert set(place_modules(names).values()) == {("3", "up_proj")}


def test_what_stands_outside_of_layers_has_no_layer() -> None:
    assert place_modules([*LLAMA, "lm_head"])["lm_head"] == ("", "lm_head")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_two_layers_of_the_same_kinds(family: Family) -> None:
    import torch

    from qlora_pl.modeling.base.encoder_decoder import auto_class
    from qlora_pl.modeling.base.structure import linear_names

    config = AutoConfig.for_model(family.model_type, **family.settings)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    places = place_modules(linear_names(model))
    assert len(set(places.values())) == len(places)
    layers = {layer for layer, _ in places.values()}
    stacks = ("encoder ", "decoder ") if family.is_encoder_decoder else ("",)
    assert layers == {f"{stack}{i}" for stack in stacks for i in range(2)}


def test_layers_are_sorted_as_one_counts() -> None:
    names = [f"model.layers.{i}.{kind}" for i in range(12) for kind in ("mlp.up_proj", "q_proj")]
    assert sorted(sorted(names), key=in_order) == names
    assert sorted(["lm_head", "h.1.a", "h.1.0", "h.1"], key=in_order) == [
        "h.1",
        "h.1.a",
        "h.1.0",
        "lm_head",
    ]
