"""Differences over the examples that two models were scored on, by bootstrap.

Seeds tell how far training itself varies; examples tell how far a score would vary on other
questions of the same kind. They are two questions, and their intervals are named apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEAST_EXAMPLES = 20
"""With fewer a bootstrap covers less than it says."""
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class OverExamples:
    """A mean difference over examples."""

    mean: float
    interval: tuple[float, float] | None
    """Percentile bootstrap; None with fewer than ``LEAST_EXAMPLES``."""
    num_examples: int


def over_examples(
    cell: Sequence[float], reference: Sequence[float], level: float = 0.95, seed: int = 0
) -> OverExamples:
    """The mean difference of two models on the same examples.

    Args:
        cell: A score for each example.
        reference: Of the same examples, in the same order.
        level: Of confidence.
        seed: Of the resamples, so that a report is the same each time.

    Raises:
        ValueError: if the examples are not as many.
    """
    differences = np.asarray(cell, dtype=float) - np.asarray(reference, dtype=float)
    mean, count = float(differences.mean()), len(differences)
    if count < LEAST_EXAMPLES:
        return OverExamples(mean=mean, interval=None, num_examples=count)
    if not differences.std():
        return OverExamples(mean=mean, interval=(mean, mean), num_examples=count)
    found = stats.bootstrap(
        (differences,),
        np.mean,
        confidence_level=level,
        n_resamples=RESAMPLES,
        method="percentile",
        batch=100,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return OverExamples(
        mean=mean, interval=(float(found.low), float(found.high)), num_examples=count
    )
