"""The kinds of changes that are left to a run, in the order in which they are tried."""

from __future__ import annotations

from qlora_pl.planning.advice.batch_levers import (
    attention,
    checkpointing,
    more_devices,
    shorter_rows,
    smaller_batches,
)
from qlora_pl.planning.advice.levels import Lever
from qlora_pl.planning.advice.stored_levers import (
    adapter_dtype,
    double_quant,
    eight_bit_optimizer,
    four_bits,
    lower_ranks,
    paging,
    plain_adapters,
)
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.runs.run_keys import RunKeys
from qlora_pl.planning.shapes.model_shape import ModelShape


def levers_of(shape: ModelShape, setting: TrainingSetting, keys: RunKeys) -> list[Lever]:
    """The kinds of changes that are left to a run."""
    makers = {
        "paging": paging(setting),
        "checkpointing": checkpointing(setting),
        "micro-batch": smaller_batches(setting, keys),
        "attention": attention(setting),
        "double quantisation": double_quant(setting),
        "optimizer": eight_bit_optimizer(setting),
        "adapter dtype": adapter_dtype(setting),
        "rank": lower_ranks(setting),
        "length": shorter_rows(shape, setting, keys),
        "method": plain_adapters(setting),
        "quantisation": four_bits(setting),
        "devices": more_devices(setting, keys),
    }
    return [
        Lever(name=name, levels=levels, adds_devices=name == "devices")
        for name, maker in makers.items()
        if (levels := tuple(maker))
    ]
