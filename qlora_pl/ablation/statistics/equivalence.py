"""Whether two cells are as good as each other, and how many seeds a question needs.

Most of the paper's claims are of no difference ("rank does not matter", "NF4 matches 16 bits").
That an interval contains zero does not show it: with few seeds every interval does. What shows it
is an interval that lies within the margin that one cares about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats
from statsmodels.stats.power import TTestPower

from qlora_pl.ablation.statistics.differences import Difference

MOST_SEEDS = 100_000
"""No more are counted; whoever would need them asks another question."""


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """Two one-sided t tests (Schuirmann 1987): is the difference within a margin, both ways?"""

    difference: Difference
    margin: float
    """In the metric's unit."""
    p: float | None
    """The larger of both; None where the seeds have no spread."""
    p_corrected: float | None
    """The same, times the number of such questions in the grid (Bonferroni)."""

    def holds(self, level: float) -> bool | None:
        """Whether they are as good as each other; None where nothing can be said."""
        return None if self.p_corrected is None else self.p_corrected <= 1 - level


def equivalence(difference: Difference, margin: float, num_questions: int = 1) -> Equivalence:
    """Whether a difference lies within a margin.

    Args:
        difference: See ``differences.compare``.
        margin: Above 0, in the metric's unit.
        num_questions: Of this kind in the grid.
    """
    if difference.sd is None:
        return Equivalence(difference=difference, margin=margin, p=None, p_corrected=None)
    sides = (
        stats.ttest_1samp(difference.values, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(difference.values, margin, alternative="less").pvalue,
    )
    p = float(max(sides))
    return Equivalence(
        difference=difference, margin=margin, p=p, p_corrected=min(1.0, num_questions * p)
    )


def seeds_needed(
    sd: float, difference: float, level: float = 0.95, power: float = 0.8
) -> int | None:
    """Seeds of each cell, with which a difference would be found so often; None: beyond counting.

    Args:
        sd: Of paired differences between seeds.
        difference: That is to be seen, in the same unit.
        level: Of confidence of a single comparison.
        power: Share of grids in which it would be found.
    """
    effect = abs(difference) / sd
    test = TTestPower()
    # The library's own solver starts above two and finds no root for large effects.
    low, high = 2, 2
    while test.power(effect, high, 1 - level) < power:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while low < high:
        middle = (low + high) // 2
        if test.power(effect, middle, 1 - level) >= power:
            high = middle
        else:
            low = middle + 1
    return math.ceil(high)
