"""Adapters over a base that is filled layer by layer begin as those over one that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import load

from qlora_pl.modeling.adapters.late_start import LateStarts
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.parameters import trainable_tensors

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_adapters_over_an_empty_base_begin_where_those_over_a_full_one_do(
    tiny_base: Path, init: Any
) -> None:
    """Drawn in another order, with other draws in between; the full base is the source."""
    config = LoRAConfig(r=4, init=init, rank_pattern={"up_proj": 2})
    expected = trainable_tensors(attach_adapters(load(tiny_base).model, config, seed=7))
    starts = LateStarts()
    with torch.device("meta"):
        skeleton = build_skeleton(tiny_base)
    model = attach_adapters(skeleton, config, seed=7, starts=starts)
    assert all(p.is_meta for p in trainable_tensors(model).values())
    for part in ("layers.1", "layers.0.mlp"):
        before = torch.get_rng_state()
        starts.draw(model.get_submodule(f"base_model.model.model.{part}"))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
    starts.draw(model)
    drawn = trainable_tensors(model)
    assert drawn.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(drawn[name], tensor), name
        assert drawn[name].dtype == tensor.dtype
        assert drawn[name].requires_grad
    assert not any(name for name, p in model.named_parameters() if "lora_" in name and p.is_meta)
    starts.draw(model)  # what is drawn stays
    assert all(torch.equal(trainable_tensors(model)[name], t) for name, t in expected.items())
