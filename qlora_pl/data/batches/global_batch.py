"""``data.global_batch_size`` -> the accumulation that makes it up on this run's devices.

The experiment's batch is a setting of its own, so that more devices change how long a run takes and
not what is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from qlora_pl.errors import ConfigurationError

KEY = "data.global_batch_size"
AUTO: Literal["auto"] = "auto"
SHARE = 16
"""Rows of a step on each device, where nobody has asked for another number (the paper's)."""


def settle_accumulation(data: Any, trainer: Any) -> None:
    """Derive a data module's accumulation and hand it to its trainer, which is to step by it.

    Without ``data.global_batch_size`` the trainer's accumulation stays what it is, and while
    ``data.batch_size`` is ``auto``.

    Args:
        data: An ``InstructionDataModule``.
        trainer: The one that trains on it; None: the rows are only looked at, as on one device.

    Raises:
        ConfigurationError: if the global batch cannot be cut so, or the trainer was told to
            accumulate another number of micro-batches.
    """
    if data.global_batch_size is None:
        return
    world_size = 1 if trainer is None else trainer.world_size
    if data.asked_batch_size == AUTO and trainer is not None:  # not settled yet
        accumulation_of(data.global_batch_size, 1, world_size)
        return
    batch_size = None if data.tokens_per_batch else data.batch_size
    unit = "packs" if data.packing is True else "rows"
    accumulation = accumulation_of(data.global_batch_size, batch_size, world_size, unit)
    if trainer is None:
        data.accumulation = accumulation
        return
    chosen = chosen_accumulation(trainer)
    if chosen not in (None, accumulation):
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches: {chosen} contradicts {KEY} "
            f"{data.global_batch_size}, which is {_product(accumulation, batch_size, world_size)}; "
            "remove one of the two."
        )
    trainer.accumulate_grad_batches = accumulation


def possible_sizes(share: int) -> list[int]:
    """The sizes of equal micro-batches that make up a device's share of a step, largest first."""
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    return sorted({*small, *(share // size for size in small)}, reverse=True)


def accumulation_of(
    global_batch_size: int, batch_size: int | None, world_size: int, unit: str = "rows"
) -> int:
    """Micro-batches of an optimizer step on each device.

    Args:
        global_batch_size: Units of an optimizer step, over all devices.
        batch_size: Units of a micro-batch; None: the unit is a micro-batch, which is not divided.
        world_size: Devices that train side by side.
        unit: What is counted, for the error.

    Raises:
        ConfigurationError: if it is no whole number; with the nearest numbers that would do.
    """
    size = batch_size or 1
    accumulation, rest = divmod(global_batch_size, size * world_size)
    if accumulation and not rest:
        return accumulation
    made_of = "micro-batches" if batch_size is None else f"{unit} in micro-batches of {size}"
    choices = [f"{KEY} {_either(_multiples(global_batch_size, size * world_size))}"]
    if batch_size is not None and global_batch_size % world_size == 0:
        of_each = global_batch_size // world_size
        choices.append(f"data.batch_size {_either(_divisors(of_each, size))}")
    if world_size > 1 and global_batch_size % size == 0:
        choices.append(
            f"{_either(_divisors(global_batch_size // size, world_size))} devices in all"
        )
    raise ConfigurationError(
        f"{KEY}: {global_batch_size} {made_of} cannot be shared out evenly on "
        f"{_count(world_size, 'device')}; the nearest that can: {_or(choices)}."
    )


def chosen_accumulation(trainer: Any) -> int | None:
    """What somebody asked for; Lightning's own trainer cannot tell 1 from its default."""
    if hasattr(trainer, "chosen_accumulation"):
        chosen: int | None = trainer.chosen_accumulation
        return chosen
    accumulation: int = trainer.accumulate_grad_batches
    return None if accumulation == 1 else accumulation


def _multiples(number: int, of: int) -> list[int]:
    """The nearest multiples around a number that is none."""
    below = number // of * of
    return [value for value in (below, below + of) if value > 0]


def _divisors(number: int, near: int) -> list[int]:
    """The nearest divisors around a number that is none."""
    divisors = [value for value in range(1, number + 1) if number % value == 0]
    below = [value for value in divisors if value < near][-1:]
    return below + [value for value in divisors if value > near][:1]


def _product(accumulation: int, batch_size: int | None, world_size: int) -> str:
    rows = "" if batch_size is None else f" of {batch_size}"
    return f"{_count(accumulation, 'micro-batch', 'es')}{rows} on {_count(world_size, 'device')}"


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))


def _or(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])}, or {choices[-1]}"
