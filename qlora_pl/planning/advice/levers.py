"""The kinds of changes that make a run smaller, each in steps from mild to strong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape

SAME = 0
"""The same gradients and so the same result, but for rounding."""
NEARLY = 1
"""Hardly another result, by what was published."""
DEVICES = 2
"""The same result, on more GPUs."""
LESS = 3
"""Less is learnt."""
OTHER = 4
"""Another experiment."""
SHORTEST = 128
LOWEST_RANK = 8
NUM_DEVICES = (2, 4, 8)
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


@dataclass(frozen=True, kw_only=True)
class RunKeys:
    """What a training file says that a plan alone does not."""

    max_length: int
    max_target_length: int | None = None
    has_two_limits: bool = False
    """Whether a row is as long as both together (``encoding: original``)."""
    global_batch_size: int | None = None
    """As in the file; None: ``accumulation`` makes up a step."""
    accumulation: int = 1
    """Micro-batches of a step on each device."""
    sets_accumulation: bool = False
    """Whether the file says so besides ``global_batch_size``."""
    tokens_per_batch: int | None = None
    share_longer: Callable[[int], float] | None = None
    """Share of the tokens that a length would cut away; None: the rows were not read."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One step of one kind of change."""

    words: str
    """What is changed."""
    keys: dict[str, Any]
    """Dotted keys of the training file and their new values."""
    change: Callable[[TrainingSetting], dict[str, Any]]
    """The fields of a setting that follow."""
    cost: str
    price: int
    """One of ``SAME`` to ``OTHER``."""


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One kind of change."""

    name: str
    levels: tuple[Level, ...]
    """From mild to strong."""
    adds_devices: bool = field(default=False)


def levers_of(shape: ModelShape, setting: TrainingSetting, keys: RunKeys) -> list[Lever]:
    """The kinds of changes that are left to a run."""
    makers = {
        "paging": _paging(setting),
        "checkpointing": _checkpointing(setting),
        "micro-batch": _smaller_batches(setting, keys),
        "attention": _attention(setting),
        "double quantisation": _double_quant(setting),
        "optimizer": _eight_bit_optimizer(setting),
        "adapter dtype": _adapter_dtype(setting),
        "rank": _lower_ranks(setting),
        "length": _shorter_rows(shape, setting, keys),
        "method": _plain_adapters(setting),
        "quantisation": _four_bits(setting),
        "devices": _more_devices(setting, keys),
    }
    return [
        Lever(name=name, levels=levels, adds_devices=name == "devices")
        for name, maker in makers.items()
        if (levels := tuple(maker))
    ]


def _plain(**fields: Any) -> Callable[[TrainingSetting], dict[str, Any]]:
    return lambda _: fields


def _paging(setting: TrainingSetting) -> Iterator[Level]:
    if (name := PAGED.get(setting.optimizer)) is not None:
        yield Level(
            words=f"{name}, whose state can wait in host memory",
            keys={"model.optimizer.name": name},
            change=_plain(optimizer=name),
            cost="the same result; slower where state is moved",
            price=SAME,
        )


def _checkpointing(setting: TrainingSetting) -> Iterator[Level]:
    if not setting.gradient_checkpointing:
        yield Level(
            words="gradient checkpointing",
            keys={"model.gradient_checkpointing": True},
            change=_plain(gradient_checkpointing=True),
            cost="the same result; activations are computed twice",
            price=SAME,
        )


def _smaller_batches(setting: TrainingSetting, keys: RunKeys) -> Iterator[Level]:
    if keys.tokens_per_batch is not None:
        yield from _smaller_budgets(setting, keys)
        return
    for size in reversed(range(1, setting.batch_size)):
        if setting.batch_size * keys.accumulation % size:
            continue
        accumulation = setting.batch_size * keys.accumulation // size
        changes: dict[str, Any] = {"data.batch_size": size}
        if keys.global_batch_size is None or keys.sets_accumulation:
            changes["trainer.accumulate_grad_batches"] = accumulation
        yield Level(
            words=f"micro-batches of {size} row{'s' * (size > 1)}, {accumulation} a step",
            keys=changes,
            change=_batch_of(size, accumulation),
            cost="the same result, as the rows of a step stay the same",
            price=SAME,
        )


def _batch_of(size: int, accumulation: int) -> Callable[[TrainingSetting], dict[str, Any]]:
    def change(setting: TrainingSetting) -> dict[str, Any]:
        trained = setting.trained_tokens
        if trained is not None:  # the longest rows may be trained on whole
            trained = min(trained, size * setting.tokens_per_row)
        return {
            "batch_size": size,
            "num_micro_batches": accumulation,
            "trained_tokens": trained,
        }

    return change


def _smaller_budgets(setting: TrainingSetting, keys: RunKeys) -> Iterator[Level]:
    assert keys.tokens_per_batch is not None
    for parts in (2, 4, 8):
        budget = keys.tokens_per_batch // parts
        if budget < keys.max_length:
            return
        micro_batches = keys.accumulation * parts
        changes: dict[str, Any] = {"data.tokens_per_batch": budget}
        if keys.global_batch_size is not None:
            changes["data.global_batch_size"] = keys.global_batch_size * parts
        else:
            changes["trainer.accumulate_grad_batches"] = micro_batches
        rows = max(1, setting.batch_size // parts)
        yield Level(
            words=f"micro-batches of {budget:,} tokens, {micro_batches} a step",
            keys=changes,
            change=_batch_of(rows, micro_batches),
            cost="nearly the same result: a step has about as many rows as before",
            price=NEARLY,
        )


def _attention(setting: TrainingSetting) -> Iterator[Level]:
    if setting.attention == "eager":
        yield Level(
            words="an attention kernel that keeps no square matrix",
            keys={"model.attn_implementation": "auto"},
            change=_plain(attention="auto"),
            cost="the same result but for rounding, and faster",
            price=SAME,
        )


def _double_quant(setting: TrainingSetting) -> Iterator[Level]:
    if setting.is_four_bits and not setting.double_quant:
        yield Level(
            words="double quantisation",
            keys={"model.quantization.double_quant": True},
            change=_plain(double_quant=True),
            cost="nearly the same result: the paper found no loss",
            price=NEARLY,
        )


def _eight_bit_optimizer(setting: TrainingSetting) -> Iterator[Level]:
    if (name := EIGHT_BITS.get(setting.optimizer)) is not None:
        yield Level(
            words=f"{name}, a quarter of the state",
            keys={"model.optimizer.name": name},
            change=_plain(optimizer=name),
            cost="nearly the same result: state is rounded to 8 bits",
            price=NEARLY,
        )


def _adapter_dtype(setting: TrainingSetting) -> Iterator[Level]:
    if setting.has_adapters and setting.adapter_dtype == "float32":
        yield Level(
            words="adapters in bfloat16, as the paper's",
            keys={"model.lora.dtype": "bfloat16"},
            change=_plain(adapter_dtype="bfloat16"),
            cost="nearly the same result: the smallest updates are rounded away",
            price=NEARLY,
        )


def _lower_ranks(setting: TrainingSetting) -> Iterator[Level]:
    if not setting.has_adapters or setting.rank_pattern:
        return
    rank = setting.r // 2
    while rank >= LOWEST_RANK:
        yield Level(
            words=f"rank {rank}",
            keys={"model.lora.r": rank},
            change=_plain(r=rank),
            cost="nearly the same result: the paper found ranks of 8 to 256 alike",
            price=NEARLY,
        )
        rank //= 2


def _shorter_rows(shape: ModelShape, setting: TrainingSetting, keys: RunKeys) -> Iterator[Level]:
    has_targets = shape.num_encoder_layers > 0
    for share in (0.75, 0.5, 0.25):
        source, target = keys.max_length, keys.max_target_length
        changes: dict[str, Any] = {}
        if keys.has_two_limits and target is not None and target > source:
            target = _shortened(target, share)
            changes["data.max_target_length"] = target
        else:
            source = _shortened(source, share)
            changes["data.max_length"] = source
            if has_targets and target is not None:
                target = _shortened(target, share)
                changes["data.max_target_length"] = target
        row = source + (target or 0) if keys.has_two_limits and not has_targets else source
        if row >= setting.tokens_per_row or max(source, target or 0) < SHORTEST:
            continue
        yield Level(
            words=f"rows of at most {row:,} tokens",
            keys=changes,
            change=_rows_of(row, target if has_targets else None),
            cost=_cost_of_cutting(row, keys),
            price=LESS,
        )


def _shortened(length: int, share: float) -> int:
    return max(SHORTEST // 2, int(length * share) // 32 * 32)


def _rows_of(row: int, target: int | None) -> Callable[[TrainingSetting], dict[str, Any]]:
    def change(setting: TrainingSetting) -> dict[str, Any]:
        changes: dict[str, Any] = {"tokens_per_row": min(row, setting.tokens_per_row)}
        if target is not None and setting.target_tokens_per_row is not None:
            changes["target_tokens_per_row"] = min(target, setting.target_tokens_per_row)
        if setting.trained_tokens is not None:
            changes["trained_tokens"] = min(setting.trained_tokens, setting.batch_size * row)
        return changes

    return change


def _cost_of_cutting(row: int, keys: RunKeys) -> str:
    if keys.share_longer is None:
        return "what is cut off longer rows is not learnt"
    return f"{keys.share_longer(row):.1%} of the tokens are cut off and not learnt"


def _plain_adapters(setting: TrainingSetting) -> Iterator[Level]:
    if setting.method == "dora":
        yield Level(
            words="adapters without DoRA's lengths",
            keys={"model.lora.method": "lora"},
            change=_plain(method="lora"),
            cost="another method",
            price=OTHER,
        )


def _four_bits(setting: TrainingSetting) -> Iterator[Level]:
    if setting.is_four_bits:
        return
    keys = {"model.quantization.quant_type": "nf4", "model.quantization.double_quant": True}
    fields: dict[str, Any] = {"quant_type": "nf4", "double_quant": True}
    if setting.has_adapters:
        yield Level(
            words="the base in NF4 with double quantisation",
            keys=keys,
            change=_plain(**fields),
            cost="nearly the same result: the paper found that it reaches 16 bits",
            price=NEARLY,
        )
        return
    yield Level(
        words="adapters over a base in NF4 instead of training every weight",
        keys=keys | {"model.lora.method": "lora", "model.lora.target_modules": "all-linear"},
        change=_plain(**fields, method="lora", target_modules="all-linear"),
        cost="another method, which the paper found to reach full fine-tuning",
        price=OTHER,
    )


def _more_devices(setting: TrainingSetting, keys: RunKeys) -> Iterator[Level]:
    rows = setting.batch_size * keys.accumulation * setting.num_devices
    for number in NUM_DEVICES:
        if number < setting.num_devices or (number == setting.num_devices and setting.is_shared):
            continue
        if rows % (number * setting.batch_size):
            continue
        accumulation = rows // (number * setting.batch_size)
        changes: dict[str, Any] = {"trainer.strategy": "fsdp2", "trainer.devices": number}
        if keys.global_batch_size is None or keys.sets_accumulation:
            changes["trainer.accumulate_grad_batches"] = accumulation
        yield Level(
            words=f"{number} such GPUs that share the base (fsdp2)",
            keys=changes,
            change=_plain(strategy="fsdp2", num_devices=number, num_micro_batches=accumulation),
            cost="the same result; more GPUs, which exchange the base layer by layer",
            price=DEVICES,
        )
