"""Norm and scaling of gradients that are whole, sharded, or some of each.

torch does both for lists of DTensors alone, but for no mixed list, and for shards that were
offloaded to the CPU only if the devices can also talk about tensors there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from qlora_pl.modeling.optimization.sharded_optimizer import local_shard
from qlora_pl.modeling.optimization.sharded_state import Sharding


def total_norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all gradients together; where one is sharded, all devices must call it.

    Args:
        gradients: DTensors, each device's shards of which are counted once, and plain tensors,
            which are taken for the same on all devices.
    """
    shards = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not shards:
        return float(get_total_norm(gradients))
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    sharding = Sharding.of(shards[0])
    assert sharding is not None
    # float64: a square of a float32 may overflow
    square = get_total_norm([local_shard(shard) for shard in shards]).double().square()
    square = square.to(sharding.device)
    all_reduce(square, group=sharding.group)
    return math.sqrt(float(square) + float(get_total_norm(whole)) ** 2)


def scale_gradients(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply every gradient in place, each device its own part."""
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], factor)
