"""Whether a metric rises or falls along an ordered axis, such as rank, by a permutation test.

If the axis meant nothing, the values that a seed gave along it could have come in any order. All
orders, within each seed, are counted; so the test needs no assumption about how values scatter, and
says honestly what few seeds cannot show: two ranks and three seeds have 8 orders, of which the two
extreme ones are always there, so p is never below 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

MOST_ORDERS = 20_000
"""So many orders are counted one by one; beyond that as many are drawn."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A metric along an axis."""

    axis: str
    cells: tuple[str, ...]
    """In the order of the axis."""
    seeds: tuple[int, ...]
    """Those that every cell finished."""
    slope: float
    """Of the metric for one place along the axis, mean over seeds (least squares)."""
    p: float
    """Of a slope so far from zero, in either direction, if the axis meant nothing."""
    least_p: float
    """The smallest that so many cells and seeds could give."""
    is_exact: bool
    """Whether all orders were counted, not drawn."""


def trend(
    axis: str, cells: Sequence[str], values: Mapping[str, Mapping[int, float]], seed: int = 0
) -> Trend | None:
    """The trend over cells in their order; None if no seed finished all of them.

    Args:
        axis: What it is called.
        cells: Two or more, in the order of the axis.
        values: Cell -> seed -> metric.
        seed: Of the orders that are drawn, where there are too many to count.
    """
    seeds = tuple(
        sorted(
            one
            for one in set.intersection(*(set(values.get(cell, {})) for cell in cells))
            if all(math.isfinite(values[cell][one]) for cell in cells)
        )
    )
    if not seeds:
        return None
    columns = [np.array([values[cell][one] for one in seeds]) for cell in cells]
    places = np.arange(len(cells)) - (len(cells) - 1) / 2
    weights = places / (places**2).sum()

    def slope(*samples: Any, axis: int = -1) -> Any:
        means = np.stack([sample.mean(axis=axis) for sample in samples])
        return np.tensordot(weights, means, axes=1)

    num_orders = math.factorial(len(cells)) ** len(seeds)
    found = stats.permutation_test(
        columns,
        slope,
        permutation_type="samples",
        n_resamples=MOST_ORDERS,
        rng=np.random.default_rng(seed),
    )
    is_exact = num_orders <= MOST_ORDERS
    return Trend(
        axis=axis,
        cells=tuple(cells),
        seeds=seeds,
        slope=float(found.statistic),
        p=float(found.pvalue),
        least_p=min(1.0, 2 / num_orders) if is_exact else 2 / (MOST_ORDERS + 1),
        is_exact=is_exact,
    )
