"""``RunKeys``: what a training file says besides its setting, so that advice can name its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
    weighs_micro_batches: bool = False
    """Whether each micro-batch weighs the same, so that its size is a part of the experiment."""
    tokens_per_batch: int | None = None
    overlong: str = "cut"
    """``data.overlong``: what becomes of a row that is longer."""
    max_lost_ratio: float = 0.01
    """Share of the trained tokens that may be lost to that; beyond it a run does not start."""
    share_lost: Callable[[int], float] | None = None
    """Share of the trained tokens that a shorter limit would take; None: no rows were read."""
