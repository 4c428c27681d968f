"""Changes of what passes through at a time: micro-batches, rows, what is kept of them, devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from qlora_pl.data.batches.global_batch import possible_sizes
from qlora_pl.planning.advice.levels import DEVICES, LESS, NEARLY, SAME, Level, to_fields
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.runs.run_keys import RunKeys
from qlora_pl.planning.shapes.model_shape import ModelShape

SHORTEST = 128
"""Tokens of a row below which none is cut."""
NUM_DEVICES = (2, 4, 8)


def checkpointing(setting: TrainingSetting) -> Iterator[Level]:
    """Activations computed again."""
    if not setting.gradient_checkpointing:
        yield Level(
            words="gradient checkpointing",
            keys={"model.gradient_checkpointing": True},
            change=to_fields(gradient_checkpointing=True),
            cost="the same result; activations are computed twice",
            price=SAME,
        )


def smaller_batches(setting: TrainingSetting, keys: RunKeys) -> Iterator[Level]:
    """Fewer rows at a time, as many in a step."""
    if keys.tokens_per_batch is not None:
        yield from _smaller_budgets(setting, keys)
        return
    cost, price = "the same result, as the rows of a step stay the same", SAME
    if keys.weighs_micro_batches:
        cost = "rows weigh otherwise, as model.normalize_loss_by is micro_batches"
        price = NEARLY
    rows = setting.batch_size * keys.accumulation
    for size in possible_sizes(rows):
        if size >= setting.batch_size:
            continue
        accumulation = rows // size
        changes: dict[str, Any] = {"data.batch_size": size}
        if keys.global_batch_size is None or keys.sets_accumulation:
            changes["trainer.accumulate_grad_batches"] = accumulation
        yield Level(
            words=f"micro-batches of {size} row{'s' * (size > 1)}, {accumulation} a step",
            keys=changes,
            change=_batch_of(size, accumulation),
            cost=cost,
            price=price,
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


def attention(setting: TrainingSetting) -> Iterator[Level]:
    """A fused kernel in place of one that keeps a square matrix."""
    if setting.attention == "eager":
        yield Level(
            words="an attention kernel that keeps no square matrix",
            keys={"model.attn_implementation": "auto"},
            change=to_fields(attention="auto"),
            cost="the same result but for rounding, and faster",
            price=SAME,
        )


def shorter_rows(shape: ModelShape, setting: TrainingSetting, keys: RunKeys) -> Iterator[Level]:
    """Rows cut at three quarters of the longest, at half, at a quarter."""
    has_targets = shape.num_encoder_layers > 0
    longest = keys.max_length if keys.has_two_limits else min(keys.max_length, _longest(setting))
    for share in (0.75, 0.5, 0.25):
        source, target = longest, keys.max_target_length
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
        cost, needed = _cost_of_cutting(row, keys)
        yield Level(
            words=f"rows of at most {row:,} tokens",
            keys=changes | needed,
            change=_rows_of(row, target if has_targets else None),
            cost=cost,
            price=LESS,
        )


def _longest(setting: TrainingSetting) -> int:
    """Of the run's own rows, where they were read; else of those that its file allows."""
    return max(setting.tokens_per_row, setting.target_tokens_per_row or 0)


def _shortened(length: int, share: float) -> int:
    return max(SHORTEST // 2, int(length * share) // 32 * 32)


def _cost_of_cutting(row: int, keys: RunKeys) -> tuple[str, dict[str, Any]]:
    """What a limit takes away, and the other keys without which a run would refuse it."""
    needed: dict[str, Any] = {"data.overlong": "cut"} if keys.overlong == "error" else {}
    if keys.share_lost is None:
        allowed = f"data.max_lost_ratio allows {keys.max_lost_ratio:.1%} of what is trained"
        return f"what is cut off longer rows is not learnt ({allowed})", needed
    lost = keys.share_lost(row)
    if lost > keys.max_lost_ratio:
        needed["data.max_lost_ratio"] = min(1.0, math.ceil(100 * lost + 1) / 100)
    ways = {"drop": "are in rows that are left out", "split": "are lost, as longer rows are split"}
    words = ways.get(keys.overlong, "are cut off and not learnt")
    return f"{lost:.1%} of the trained tokens {words}", needed


def _rows_of(row: int, target: int | None) -> Callable[[TrainingSetting], dict[str, Any]]:
    def change(setting: TrainingSetting) -> dict[str, Any]:
        changes: dict[str, Any] = {"tokens_per_row": min(row, setting.tokens_per_row)}
        if target is not None and setting.target_tokens_per_row is not None:
            changes["target_tokens_per_row"] = min(target, setting.target_tokens_per_row)
        if setting.trained_tokens is not None:
            changes["trained_tokens"] = min(setting.trained_tokens, setting.batch_size * row)
        return changes

    return change


def more_devices(setting: TrainingSetting, keys: RunKeys) -> Iterator[Level]:
    """Two, four or eight devices that share the base."""
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
            change=to_fields(strategy="fsdp2", num_devices=number, num_micro_batches=accumulation),
            cost="the same result; more GPUs, which exchange the base layer by layer",
            price=DEVICES,
        )
