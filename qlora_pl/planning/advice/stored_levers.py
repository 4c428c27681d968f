"""Changes of what is stored: the base, the adapters over it, the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_pl.planning.advice.levels import NEARLY, OTHER, SAME, Level, to_fields
from qlora_pl.planning.memory.training_setting import TrainingSetting

LOWEST_RANK = 8
PAGED = {
    "adamw_32bit": "paged_adamw_32bit",
    "adamw_8bit": "paged_adamw_8bit",
    "adamw_torch": "paged_adamw_32bit",
    "lion": "paged_lion_32bit",
}
EIGHT_BITS = {
    "paged_adamw_32bit": "paged_adamw_8bit",
    "adamw_32bit": "adamw_8bit",
    "adamw_torch": "adamw_8bit",
    "lion": "paged_lion_8bit",
    "paged_lion_32bit": "paged_lion_8bit",
}


def paging(setting: TrainingSetting) -> Iterator[Level]:
    """A paged optimizer in place of an ordinary one."""
    if (name := PAGED.get(setting.optimizer)) is not None:
        yield Level(
            words=f"{name}, whose state can wait in host memory",
            keys={"model.optimizer.name": name},
            change=to_fields(optimizer=name),
            cost="the same result; slower where state is moved",
            price=SAME,
        )


def eight_bit_optimizer(setting: TrainingSetting) -> Iterator[Level]:
    """Its state in 8 bits."""
    if (name := EIGHT_BITS.get(setting.optimizer)) is not None:
        yield Level(
            words=f"{name}, a quarter of the state",
            keys={"model.optimizer.name": name},
            change=to_fields(optimizer=name),
            cost="nearly the same result: state is rounded to 8 bits",
            price=NEARLY,
        )


def double_quant(setting: TrainingSetting) -> Iterator[Level]:
    """The scales quantised too."""
    if setting.is_four_bits and not setting.double_quant:
        yield Level(
            words="double quantisation",
            keys={"model.quantization.double_quant": True},
            change=to_fields(double_quant=True),
            cost="nearly the same result: the paper found no loss",
            price=NEARLY,
        )


def four_bits(setting: TrainingSetting) -> Iterator[Level]:
    """A base in four bits; where every weight is trained, adapters over one."""
    if setting.is_four_bits:
        return
    keys = {"model.quantization.quant_type": "nf4", "model.quantization.double_quant": True}
    fields: dict[str, Any] = {"quant_type": "nf4", "double_quant": True}
    if setting.has_adapters:
        yield Level(
            words="the base in NF4 with double quantisation",
            keys=keys,
            change=to_fields(**fields),
            cost="nearly the same result: the paper found that it reaches 16 bits",
            price=NEARLY,
        )
        return
    yield Level(
        words="adapters over a base in NF4 instead of training every weight",
        keys=keys | {"model.lora.method": "lora", "model.lora.target_modules": "all-linear"},
        change=to_fields(**fields, method="lora", target_modules="all-linear"),
        cost="another method, which the paper found to reach full fine-tuning",
        price=OTHER,
    )


def adapter_dtype(setting: TrainingSetting) -> Iterator[Level]:
    """Adapters in 16 bits."""
    if setting.has_adapters and setting.adapter_dtype == "float32":
        yield Level(
            words="adapters in bfloat16, as the paper's",
            keys={"model.lora.dtype": "bfloat16"},
            change=to_fields(adapter_dtype="bfloat16"),
            cost="nearly the same result: the smallest updates are rounded away",
            price=NEARLY,
        )


def lower_ranks(setting: TrainingSetting) -> Iterator[Level]:
    """Half the rank, a quarter of it, and so on."""
    if not setting.has_adapters or setting.rank_pattern:
        return
    rank = setting.r // 2
    while rank >= LOWEST_RANK:
        yield Level(
            words=f"rank {rank}",
            keys={"model.lora.r": rank},
            change=to_fields(r=rank),
            cost="nearly the same result: the paper found ranks of 8 to 256 alike",
            price=NEARLY,
        )
        rank //= 2


def plain_adapters(setting: TrainingSetting) -> Iterator[Level]:
    """LoRA in place of DoRA."""
    if setting.method == "dora":
        yield Level(
            words="adapters without DoRA's lengths",
            keys={"model.lora.method": "lora"},
            change=to_fields(method="lora"),
            cost="another method",
            price=OTHER,
        )
