"""Bytes of a base as it is stored: packed matrices, what they are decoded with, and the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_pl.modeling.base.names import matches
from qlora_pl.modeling.optimization.state_precision import shard_rows
from qlora_pl.planning.memory.training_setting import ITEM_SIZES, TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape
from qlora_pl.planning.shapes.parameters import ParameterShape

CODE_BYTES = 4 * 16
"""The 16 float32 values that a code of four bits can mean; every matrix has a table of its own."""
SCALE_CODE_BYTES = 4 * 256
"""Likewise of the 8-bit scales under double quantisation."""
ABSMAX_BLOCK_SIZE = 256
"""Scales that share a second-level scale."""


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """Bytes of some parameters."""

    packed: int = 0
    """Codes of four or eight bits."""
    constants: int = 0
    """Scales, their scales, offsets, tables."""
    ends: int = 0
    """Embeddings and the head."""
    other: int = 0
    """Norms, biases, and matrices that are not quantised."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.packed + self.constants + self.ends + self.other

    def __add__(self, other: StoredBytes) -> StoredBytes:
        return StoredBytes(
            packed=self.packed + other.packed,
            constants=self.constants + other.constants,
            ends=self.ends + other.ends,
            other=self.other + other.other,
        )


def stored_bytes(
    parameters: tuple[ParameterShape, ...], setting: TrainingSetting, num_shards: int = 1
) -> StoredBytes:
    """Bytes of parameters on the device that has the most of them.

    Args:
        parameters: Of a ``ModelShape``.
        setting: How they are kept.
        num_shards: Parts that each is cut into, along its first dimension. What packed matrices are
            decoded with stays whole.
    """
    total = StoredBytes()
    for parameter in parameters:
        names = parameter.module_names()
        packed = num_packed(parameter, setting)
        if packed:
            codes = packed * _packed_part(parameter, setting, num_shards)
            constants = packed * constant_bytes(parameter, setting)
            total += StoredBytes(packed=codes, constants=constants)
        rest = (len(names) - packed) * _plain_part(parameter, setting, num_shards)
        if parameter.role in ("embedding", "head"):
            total += StoredBytes(ends=rest)
        else:
            total += StoredBytes(other=rest)
    return total


def num_packed(parameter: ParameterShape, setting: TrainingSetting) -> int:
    """In how many layers a parameter is quantised."""
    if not setting.is_quantized or parameter.role != "linear" or parameter.is_fragile:
        return 0
    return sum(not matches(name, setting.skip_modules) for name in parameter.module_names())


def _packed_part(parameter: ParameterShape, setting: TrainingSetting, num_shards: int) -> int:
    if not setting.is_four_bits:
        return parameter.size
    return math.ceil(math.ceil(parameter.size / 2) / num_shards)  # a byte has two codes


def constant_bytes(parameter: ParameterShape, setting: TrainingSetting) -> int:
    """Bytes of what one packed matrix is decoded with."""
    if not setting.is_four_bits:
        return 4 * parameter.outputs  # a float32 scale a row
    num_scales = math.ceil(parameter.size / setting.block_size)
    if not setting.double_quant:
        return 4 * num_scales + CODE_BYTES
    num_second = math.ceil(num_scales / ABSMAX_BLOCK_SIZE)
    return num_scales + 4 * num_second + 4 + CODE_BYTES + SCALE_CODE_BYTES  # 4: their offset


def _plain_part(parameter: ParameterShape, setting: TrainingSetting, num_shards: int) -> int:
    rows = shard_rows(parameter.shape, num_shards)
    return item_size(parameter, setting) * math.prod((rows, *parameter.shape[1:]))


def item_size(parameter: ParameterShape, setting: TrainingSetting) -> int:
    """Bytes of one value of a parameter that is not quantised."""
    if parameter.is_fragile and setting.rest_dtype == "float16":
        return 4
    return ITEM_SIZES[setting.rest_dtype]


def bits_per_weight(shape: ModelShape, setting: TrainingSetting) -> float:
    """Bits of a quantised weight with its share of the scales and tables, over the whole model."""
    stored = stored_bytes(shape.linears, setting)
    weights = sum(p.size * num_packed(p, setting) for p in shape.linears)
    return 8 * (stored.packed + stored.constants) / max(1, weights)
