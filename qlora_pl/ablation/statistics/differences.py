"""Paired differences between cells of a grid, each with its interval and its place among all.

The same seed means the same order of rows and, where shapes allow, the same start of the adapters,
so what a seed does to both cells of a pair cancels in their difference. Over the few seeds that
anyone can afford only the t interval covers what it says: a bootstrap over three seeds covers 76 %.

Two intervals are given, and both are labelled. The single one covers its own difference in 95 of
100 grids. Of five such intervals one excludes zero in every fifth grid without any effect, so
whether cells differ follows Holm's correction over the comparisons asked for, and how large a
difference can still be follows the simultaneous interval (Bonferroni), which covers all at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What a cell's metric is above its reference's, over the seeds that both have.

    Values that need a spread between seeds are None where there is none, and ``why_not`` says why.
    """

    cell: str
    reference: str
    seeds: tuple[int, ...]
    """Those that both cells finished."""
    values: tuple[float, ...]
    """Cell minus reference, a seed each, in the metric's unit."""
    mean: float
    sd: float | None = None
    """Standard deviation of the values (n - 1)."""
    single: Interval | None = None
    """Covers this difference at the level."""
    simultaneous: Interval | None = None
    """Covers all differences that were asked for at once, at the level (Bonferroni)."""
    p: float | None = None
    """Of a paired t test, two-sided."""
    p_holm: float | None = None
    """The same, corrected over all comparisons asked for (Holm 1979)."""
    effect_size: float | None = None
    """Mean over standard deviation of the differences (Cohen's d for pairs)."""
    why_not: str | None = None

    def differs(self, level: float) -> bool | None:
        """Whether the cells differ, by Holm; None where nothing can be said.

        Args:
            level: Of confidence, 0.95 say.
        """
        return None if self.p_holm is None else self.p_holm <= 1 - level

    @property
    def largest(self) -> float | None:
        """The largest difference, in either direction, that the simultaneous interval allows."""
        return None if self.simultaneous is None else max(map(abs, self.simultaneous))


def compare(
    values: Mapping[str, Mapping[int, float]],
    pairs: Sequence[tuple[str, str]],
    level: float = 0.95,
) -> list[Difference]:
    """The difference of each pair of cells, corrected over all of them.

    Args:
        values: Cell -> seed -> metric. A seed that one of a pair lacks is left out of the pair.
        pairs: (cell, reference), as they were asked for.
        level: Of confidence.
    """
    differences = [_difference(cell, reference, values, level) for cell, reference in pairs]
    tested = [index for index, one in enumerate(differences) if one.p is not None]
    if not tested:
        return differences
    corrected = multipletests([differences[index].p for index in tested], method="holm")[1]
    for index, p_holm in zip(tested, corrected, strict=True):
        one = differences[index]
        differences[index] = replace(
            one,
            p_holm=float(p_holm),
            simultaneous=t_interval(one.values, 1 - (1 - level) / len(tested)),
        )
    return differences


def t_interval(values: Sequence[float], level: float) -> Interval:
    """The t interval of a mean.

    Args:
        values: Two or more, not all the same.
        level: Of confidence.
    """
    low, high = stats.t.interval(
        level, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    return float(low), float(high)


def _difference(
    cell: str, reference: str, values: Mapping[str, Mapping[int, float]], level: float
) -> Difference:
    seeds = tuple(sorted(set(values.get(cell, {})) & set(values.get(reference, {}))))
    seeds = tuple(
        seed
        for seed in seeds
        if math.isfinite(values[cell][seed]) and math.isfinite(values[reference][seed])
    )
    found = tuple(values[cell][seed] - values[reference][seed] for seed in seeds)
    difference = Difference(
        cell=cell,
        reference=reference,
        seeds=seeds,
        values=found,
        mean=float(np.mean(found)) if found else math.nan,
    )
    if why_not := _why_no_interval(found):
        return replace(difference, why_not=why_not)
    sd = float(np.std(found, ddof=1))
    return replace(
        difference,
        sd=sd,
        single=t_interval(found, level),
        p=float(stats.ttest_1samp(found, 0.0).pvalue),
        effect_size=difference.mean / sd,
    )


def _why_no_interval(found: Sequence[float]) -> str | None:
    if not found:
        return "no seed was finished by both"
    if len(found) == 1:
        return "one seed has no spread, so nothing says how far off this difference may be"
    if len(set(found)) == 1:
        return (
            f"all {len(found)} seeds gave the very same difference, so that there is no spread to "
            "judge it by"
        )
    return None
