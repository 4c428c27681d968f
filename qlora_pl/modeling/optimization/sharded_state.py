"""Between one device's shard of a tensor of optimizer state and the whole of it on the host.

Checkpoints hold whole tensors, so that they move between one process, DDP and FSDP2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, gather
from torch.distributed.tensor import DTensor, Shard

from qlora_pl.modeling.optimization.state_precision import BLOCK, shard_rows

PER_WEIGHT = frozenset({"state1", "state2", "exp_avg", "exp_avg_sq", "momentum_buffer"})
"""Keys of state with one value for each weight: sharded as the weights are."""
PER_BLOCK = frozenset({"absmax1", "absmax2"})
"""Keys of state with one value for each block of 256 weights in row-major order."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How FSDP2 cut a parameter: along its first dimension, into equal parts but for the last."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    num_shards: int
    rank: int
    """Which shard this device has."""
    group: ProcessGroup
    """The devices that share it."""
    device: torch.device
    """Where the group can exchange tensors; an offloaded shard lies elsewhere."""

    @classmethod
    def of(cls, parameter: Tensor) -> Sharding | None:
        """That of a parameter; None if it is whole."""
        if not isinstance(parameter, DTensor):
            return None
        mesh = parameter.device_mesh
        assert mesh.ndim == 1, f"sharded in {mesh.ndim} dimensions"
        assert parameter.placements == (Shard(0),), f"sharded as {parameter.placements}"
        index = torch.cuda.current_device() if mesh.device_type == "cuda" else 0
        return cls(
            shape=tuple(parameter.shape),
            num_shards=mesh.size(),
            rank=mesh.get_local_rank(),
            group=mesh.get_group(),
            device=torch.device(mesh.device_type, index),
        )

    def lengths(self, key: str) -> list[int]:
        """The first dimension of each shard of the state under ``key``; empty if it is not cut."""
        rows = shard_rows(self.shape, self.num_shards)
        if key in PER_WEIGHT:
            each, total = rows, self.shape[0]
        elif key in PER_BLOCK:
            # a block never straddles two shards (state_precision's rule), and the last may be short
            each = math.ceil(rows * math.prod(self.shape[1:]) / BLOCK)
            total = math.ceil(math.prod(self.shape) / BLOCK)
        else:
            return []
        return [min(each, max(0, total - each * rank)) for rank in range(self.num_shards)]


def whole_on_host(key: str, value: Any, sharding: Sharding | None) -> Any:
    """Copy one value of state to the host, gathered if it is sharded; all devices must call it.

    Args:
        key: Of the value in the parameter's state.
        value: This device's part.
        sharding: The parameter's; None if it is whole.

    Returns:
        The whole tensor, in memory of its own, or the number that ``value`` is. Devices other than
        the first get None for what is sharded.
    """
    if not isinstance(value, Tensor):
        return value.item() if hasattr(value, "item") else value  # weights_only refuses numpy's
    local = value.detach()
    lengths = sharding.lengths(key) if sharding else []
    if sharding is None or not lengths:
        # copy=True: a paged tensor calls itself one on the CPU and would be handed out as it is
        return local.to("cpu", copy=True)
    local = local.to_local() if isinstance(local, DTensor) else local
    padded = local.new_zeros((lengths[0], *local.shape[1:]), device=sharding.device)
    padded[: len(local)] = local
    is_first = sharding.rank == 0
    parts = [torch.empty_like(padded) for _ in lengths] if is_first else None
    gather(padded, parts, group=sharding.group, group_dst=0)
    if parts is None:
        return None
    return torch.cat([part[:length].cpu() for part, length in zip(parts, lengths, strict=True)])


def part_of_device(key: str, value: Any, parameter: Tensor) -> Any:
    """Cut this device's part out of one whole value of a parameter's state.

    Returns:
        ``value`` itself if nothing is to be cut; else memory of its own, since copying a view
        copies, and keeps, the whole tensor behind it.
    """
    sharding = Sharding.of(parameter)
    if sharding is None or not isinstance(value, Tensor):
        return value
    lengths = sharding.lengths(key)
    if not lengths:
        return value
    start = sum(lengths[: sharding.rank])
    return value.narrow(0, start, lengths[sharding.rank]).clone()


def as_dtensor(local: Tensor, parameter: DTensor) -> DTensor:
    """A shard of state as torch's own optimizers hold it: sharded as its parameter is."""
    return DTensor.from_local(
        local.to(parameter.to_local().device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
