"""What ``auto`` comes to by a plan: the strategy, the rows of a micro-batch, checkpointing.

``fit`` asks here with what its devices have, and ``plan`` with the memory of the card it was given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from qlora_pl.data.batches.global_batch import AUTO, possible_sizes
from qlora_pl.planning.memory.training_setting import Strategy

USABLE = 0.92
"""Share of a device's memory that a plan may fill where the run chooses for itself."""
WORTHWHILE_TOKENS = 512
"""Of a micro-batch from which on none is recomputed for the sake of a larger one. Recomputing makes
three passes over the base out of two, and a pass costs its tokens and, for decoding the weights, as
much as some 215 tokens more: 2 x (430 + 215) are 3 x 430."""


class Choice(NamedTuple):
    """How a step is cut on each device."""

    batch_size: int
    recomputes: bool


def choices(
    batch_size: Any, checkpointing: Any, share: int, size: int, width: int, can_recompute: bool
) -> list[Choice]:
    """What auto may come to, in the order in which it is wanted: fast before small.

    Args:
        batch_size: As asked for; ``auto``: every divisor of ``share``, largest first.
        checkpointing: As asked for; ``auto``: off before on.
        share: Rows of a step on a device.
        size: The rows of a micro-batch where they are not auto.
        width: Tokens of the longest row.
        can_recompute: Whether the family can.
    """
    sizes = possible_sizes(share) if batch_size == AUTO else [size]
    if checkpointing != AUTO:
        return [Choice(size, bool(checkpointing)) for size in sizes]
    if not can_recompute:
        return [Choice(size, False) for size in sizes]
    large = [size for size in sizes if size == sizes[0] or size * width >= WORTHWHILE_TOKENS]
    return [Choice(size, False) for size in large] + [Choice(size, True) for size in sizes]


def in_words(choice: Choice) -> str:
    """A choice within a sentence."""
    rows = f"{choice.batch_size} row{'s' * (choice.batch_size != 1)}"
    return f"{rows} {'with' if choice.recomputes else 'without'} recomputing"


def strategy_for(whole: float, shared: float, memory: float) -> Strategy:
    """The strategy for several devices where none was named.

    Args:
        whole: Bytes that training takes of a device which holds the whole base.
        shared: The same where the devices share it.
        memory: Bytes of the smallest device.
    """
    if whole <= USABLE * memory:
        return "ddp"
    return "fsdp2" if shared <= USABLE * memory else "fsdp2_offload"
