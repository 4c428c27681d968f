"""Round numbers along an axis of a picture, and where a value lies on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)
ROOM = 0.06
"""Of the span, left free at both ends."""


@dataclass(frozen=True)
class Scale:
    """From values to pixels.

    Args:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Pixels.
        end: Pixels; below ``start`` for an axis that goes up.
    """

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixels of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the scale."""
        raw = (self.high - self.low) / most
        power = 10 ** math.floor(math.log10(raw))
        step = next(one * power for one in ROUND if one * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def scale_over(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale that holds all values with some room; a single value stands in its middle.

    Args:
        values: Finite ones.
        start: Pixels.
        end: Pixels.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = high - low or abs(high) or 1.0
    return Scale(low - ROOM * span, high + ROOM * span, start, end)


def tick_words(ticks: Sequence[float]) -> list[str]:
    """Ticks as text, all with as many decimals as their step needs."""
    if len(ticks) < 2:
        return [f"{tick:.3g}" for tick in ticks]
    step = abs(ticks[1] - ticks[0])
    if max(map(abs, ticks)) >= 1e6 or step < 1e-6:
        return [f"{tick:.3g}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1  # steps of 2.5
    return [f"{tick + 0.0:.{decimals}f}" for tick in ticks]
