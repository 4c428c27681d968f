"""Which state has 8 bits, held against blocks and shards counted one element at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.optimization.optimizers import (
    OptimizerConfig,
    build_optimizer,
    optimizer_state_bytes,
)
from qlora_pl.modeling.optimization.state_precision import keeps_8bit_state, refuse_shard_count

SHAPES = [
    (64, 4096),
    (11008, 64),
    (16, 576),  # SmolLM2 at rank 16: an eighth is 2 * 576 elements, four and a half blocks
    (64, 576),
    (639, 32),
    (601, 32),
    (3, 8192),
    (3, 8200),
    (1, 4096),
    (1, 4095),
    (1, 5000),
    (4096,),
    (4095,),
    (4100,),
    (8, 16, 32),
    (512,),
    (63, 65),
    (64, 64),
]


def blocks_straddle(shape: tuple[int, ...], num_shards: int) -> bool:
    """Whether an element's block has elements of another shard, by torch's own chunks."""
    blocks = torch.arange(math.prod(shape)).reshape(shape) // 256
    seen: set[int] = set()
    for shard in torch.chunk(blocks, num_shards, dim=0):
        here = set(shard.unique().tolist())
        if seen & here:
            return True
        seen |= here
    return False


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_state_has_8_bits_where_no_block_straddles_1_2_4_or_8_shards(shape: tuple) -> None:
    """Reference: the block and the shard of every element; 4,096 is bitsandbytes' threshold."""
    straddles = any(blocks_straddle(shape, number) for number in (1, 2, 4, 8))
    assert keeps_8bit_state(shape) is (math.prod(shape) >= 4096 and not straddles)


def test_the_shapes_above_are_of_every_kind() -> None:
    kinds = [keeps_8bit_state(shape) for shape in SHAPES if math.prod(shape) >= 4096]
    assert {True, False} == set(kinds)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_lion_8bit"])
@pytest.mark.parametrize("shape", [(639, 32), (601, 32), (63, 65), (3, 8200), (64, 64)], ids=str)
def test_one_process_keeps_the_state_that_any_layout_would(name: str, shape: tuple) -> None:
    """By itself bitsandbytes would keep all of these but (63, 65) in 8 bits."""
    parameter = nn.Parameter(torch.ones(shape))
    config = OptimizerConfig(name=name)
    optimizer = build_optimizer(config, [("weight", parameter)])
    parameter.grad = torch.ones(shape)
    optimizer.step()
    held = optimizer.state[parameter]
    assert held["state1"].dtype == (torch.uint8 if keeps_8bit_state(shape) else torch.float32)
    held_bytes = sum(v.untyped_storage().nbytes() for v in held.values() if torch.is_tensor(v))
    assert optimizer_state_bytes(config, [shape]) == held_bytes


def test_one_optimizers_choice_is_not_anothers() -> None:
    """The library's overrides are global, by the id of a tensor; none is used."""
    from bitsandbytes.optim import GlobalOptimManager, Lion8bit

    parameter = nn.Parameter(torch.ones(601, 32))
    build_optimizer(OptimizerConfig(name="paged_lion_8bit"), [("weight", parameter)])
    manager = GlobalOptimManager.get_instance()
    assert not manager.pid2config
    assert not manager.index2config
    theirs = Lion8bit([parameter])
    parameter.grad = torch.ones(601, 32)
    theirs.step()
    assert theirs.state[parameter]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_lion_8bit"])
def test_the_shard_counts_of_the_rule_are_allowed(name: str, num_shards: int) -> None:
    refuse_shard_count(name, num_shards)


@pytest.mark.parametrize("num_shards", [3, 5, 6, 7, 16])
def test_other_shard_counts_are_refused_with_those_that_work(num_shards: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        refuse_shard_count("paged_lion_8bit", num_shards)
    (sentence,) = caught.value.problems
    assert sentence.startswith("model.optimizer.name: paged_lion_8bit over tensors in ")
    assert f" {num_shards} shards " in sentence
    assert sentence.endswith("use 1, 2, 4 or 8 devices, or paged_lion_32bit.")
    refuse_shard_count("paged_lion_32bit", num_shards)
    refuse_shard_count("adamw_torch", num_shards)


def test_a_noteworthy_share_of_float32_state_is_said(caplog: pytest.LogCaptureFixture) -> None:
    named = {"a": nn.Parameter(torch.ones(64, 64)), "b": nn.Parameter(torch.ones(63, 64))}
    build_optimizer(OptimizerConfig(name="adamw_8bit"), named.items())
    assert "Optimizer state of 1 of 2 trained tensors (50% of the trained weights)" in caplog.text


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_32bit"])
def test_a_small_share_or_no_8_bit_state_at_all_is_not(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    named = {"a": nn.Parameter(torch.ones(64, 640)), "b": nn.Parameter(torch.ones(64))}
    build_optimizer(OptimizerConfig(name=name), named.items())
    assert not caplog.text
