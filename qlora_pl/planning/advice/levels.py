"""``Level`` and ``Lever``: one change of a run, and the steps of one kind from mild to strong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qlora_pl.planning.memory.training_setting import TrainingSetting

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


def to_fields(**fields: Any) -> Callable[[TrainingSetting], dict[str, Any]]:
    """A change that sets some fields, whatever the setting is."""
    return lambda _: fields
