"""Bytes of optimizer state, told from an optimizer's name and the shapes of what it steps.

Counted without any library, so that a plan can be made before one is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from qlora_pl.modeling.optimization.state_precision import (
    keeps_8bit_state,
    shard_rows,
    state_bytes_of_8bit,
)

SMALLEST_PAGED = 100_000
"""Elements of a tensor below which bitsandbytes does not page its state."""

OptimizerName = Literal[
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "adamw_32bit",
    "adamw_8bit",
    "lion",
    "sgd",
    "adamw_torch",
]
"""What ``model.optimizer.name`` takes."""
Shape = Sequence[int]


def num_states(name: str) -> int:
    """Running means that an optimizer keeps for each weight."""
    return 2 if "adamw" in name else 1


def state_bytes(
    name: str,
    shapes: Iterable[Shape],
    item_size: int,
    num_shards: int = 1,
    has_momentum: bool = False,
) -> int:
    """Bytes of optimizer state, paged or not, after every parameter took a step.

    Args:
        name: ``OptimizerConfig.name``.
        shapes: Of the trained parameters, whole.
        item_size: Bytes of one of their values, which only sgd's and adamw_torch's state follows.
        num_shards: Devices that share each parameter; the bytes are those of the fullest.
        has_momentum: Whether sgd keeps one.
    """
    shapes = list(shapes)
    if "8bit" in name:
        return state_bytes_of_8bit(shapes, num_states(name), num_shards)
    num_values = sum(_part(shape, num_shards) for shape in shapes)
    if name == "sgd":
        return item_size * num_values if has_momentum else 0
    if name == "adamw_torch":
        # each parameter also counts its steps, in one float32
        return 2 * item_size * num_values + 4 * len(shapes)
    return 4 * num_states(name) * num_values


def paged_bytes(name: str, shapes: Iterable[Shape], num_shards: int = 1) -> int:
    """How many of them lie in memory that the driver can move to the host.

    Args:
        name: As in ``state_bytes``.
        shapes: As in ``state_bytes``.
        num_shards: As in ``state_bytes``; the library judges the part that a device has.
    """
    if not name.startswith("paged"):
        return 0
    total = 0
    for shape in shapes:
        size = _part(shape, num_shards)
        if size >= SMALLEST_PAGED:
            total += size * (1 if "8bit" in name and keeps_8bit_state(shape) else 4)
    return num_states(name) * total


def _part(shape: Shape, num_shards: int) -> int:
    return math.prod((shard_rows(shape, num_shards), *shape[1:]))
