"""Which optimizer state is kept in 8 bits: a rule on whole tensors that no layout changes.

bitsandbytes quantises 8-bit state in blocks of 256 values of whatever tensor it is given, and
judges that tensor's size. Given shards it would cut other blocks, or keep float32, and train other
weights on two devices than on one. So the choice is made once for every number of shards that 8-bit
state may have: a block never straddles two of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

from qlora_pl.errors import ConfigurationError

logger = logging.getLogger(__name__)

SHARD_COUNTS = (1, 2, 4, 8)
"""Numbers of shards under which 8-bit state means the same."""
BLOCK = 256
"""Values that share a scale, in bitsandbytes' 8-bit optimizers."""
SMALLEST_IN_8_BITS = 4096
"""Elements of a whole tensor below which bitsandbytes keeps float32 state."""
NOTEWORTHY_SHARE = 0.1
"""Share of the trained weights with float32 state above which an 8-bit optimizer says so."""

Shape = Sequence[int]


def shard_rows(shape: Shape, num_shards: int) -> int:
    """Rows of every shard but the last ones, as FSDP2 cuts a tensor along its first dimension."""
    return math.ceil(shape[0] / num_shards)


def keeps_8bit_state(shape: Shape) -> bool:
    """Whether an 8-bit optimizer keeps this tensor's state in 8 bits; float32 otherwise.

    Args:
        shape: Of the whole tensor, never of a shard.
    """
    size = math.prod(shape)
    if size < SMALLEST_IN_8_BITS:
        return False
    # What the last shard holds may end within a block, as the tensor itself does.
    cuts = {shard_rows(shape, number) for number in SHARD_COUNTS} - {shape[0]}
    return all(rows * (size // shape[0]) % BLOCK == 0 for rows in cuts)


def refuse_shard_count(optimizer_name: str, num_shards: int) -> None:
    """An 8-bit optimizer over a number of shards that the rule was not made for.

    Args:
        optimizer_name: ``OptimizerConfig.name``.
        num_shards: Devices that share each trained tensor; 1 where they are whole (one process,
            DDP of any size).

    Raises:
        ConfigurationError: naming the numbers that work, and an optimizer that works with any.
    """
    if "8bit" in optimizer_name and num_shards not in SHARD_COUNTS:
        raise ConfigurationError(
            f"model.optimizer.name: {optimizer_name} over tensors in {num_shards} shards would cut "
            "its blocks of state elsewhere than on one device, and train other weights; use "
            f"{', '.join(map(str, SHARD_COUNTS[:-1]))} or {SHARD_COUNTS[-1]} devices, or "
            f"{optimizer_name.replace('8bit', '32bit')}."
        )


def report_float32_state(shapes: Iterable[Shape]) -> None:
    """Log how many trained tensors keep float32 state under an 8-bit optimizer, if many weights do.

    Args:
        shapes: Of the whole trained tensors.
    """
    sizes = {True: [0, 0], False: [0, 0]}  # in 8 bits, or not -> (tensors, weights)
    for shape in shapes:
        counted = sizes[keeps_8bit_state(shape)]
        counted[0] += 1
        counted[1] += math.prod(shape)
    num_tensors, num_weights = sizes[False]
    share = num_weights / max(1, num_weights + sizes[True][1])
    if share > NOTEWORTHY_SHARE:
        logger.warning(
            f"Optimizer state of {num_tensors} of {num_tensors + sizes[True][0]} trained tensors "
            f"({share:.0%} of the trained weights) is float32, not 8-bit: they have fewer than "
            f"{SMALLEST_IN_8_BITS:,} elements, or {SHARD_COUNTS[-1]} or fewer devices would cut a "
            f"block of {BLOCK} in two."
        )


def state_bytes_of_8bit(shapes: Iterable[Shape], num_states: int, num_shards: int = 1) -> int:
    """Bytes that an 8-bit optimizer allocates on the device with the most rows.

    Args:
        shapes: Of the whole trained tensors.
        num_states: Running means for each weight: 2 for AdamW, 1 for Lion.
        num_shards: Devices that share each tensor.
    """
    total, has_codes = 0, False
    for shape in shapes:
        size = math.prod((shard_rows(shape, num_shards), *shape[1:]))
        if keeps_8bit_state(shape):
            has_codes = True
            total += size + 4 * math.ceil(size / BLOCK)  # a byte each, and a scale for each block
        else:
            total += 4 * size
    # the 256 float32 values that a byte can mean are shared by all tensors
    return num_states * (total + (4 * 256 if has_codes else 0))
