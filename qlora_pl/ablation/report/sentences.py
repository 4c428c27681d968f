"""The sentences that a grid's numbers allow, and no others.

"Differs" follows Holm's correction over all comparisons asked for; "no difference larger than"
follows the simultaneous interval. That no difference was found is never told as if there were none.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_pl.ablation.report.numbers import GridNumbers
from qlora_pl.ablation.statistics.differences import Difference
from qlora_pl.ablation.statistics.equivalence import Equivalence, seeds_needed
from qlora_pl.ablation.statistics.trends import Trend


def number(value: float) -> str:
    """A number with three digits that count."""
    return f"{value:.3g}"


def sentences(found: GridNumbers) -> list[str]:
    """All that can be said, in the order of the comparisons."""
    said = []
    if any(run.state.kind != "finished" or run.value is None for run in found.runs):
        said.append(
            f"{len(found.failed)} of {len(found.runs)} runs have no value, so that comparisons "
            "with their cells rest on fewer seeds, or are missing."
        )
    if len(found.codes) > 1:
        said.append(
            f"The runs were made by {len(found.codes)} versions of the code; a difference between "
            "cells of different versions may be the code's."
        )
    if len(found.grid.file.seeds) == 1 and found.differences:
        said.append(
            "With one seed there is no interval: how far apart two runs of the same cell would lie "
            "is not known, so no difference here is more than an observation."
        )
    said += [_of_difference(found, one) for one in found.differences]
    said += [_of_equivalence(found, one) for one in found.equivalences]
    said += [_of_trend(found, one) for one in found.trends]
    return said + _needed(found)


def _of_difference(found: GridNumbers, one: Difference) -> str:
    metric, level = found.grid.file.metric, found.grid.file.level
    pair = f"{one.cell} against {one.reference}"
    if one.single is None or one.simultaneous is None or one.largest is None:
        return f"{pair}: nothing can be said ({one.why_not})."
    seeds = f"{len(one.seeds)} seeds"
    if one.differs(level):
        is_better = (one.mean < 0) == (metric.better == "lower")
        return (
            f"{pair}: {'better' if is_better else 'worse'} by {number(abs(one.mean))} "
            f"{metric.unit} in {metric.name} (simultaneous interval {_interval(one.simultaneous)}, "
            f"{seeds}, Holm's p {number(one.p_holm or 0.0)})."
        )
    return (
        f"{pair}: no difference was found; none larger than {number(one.largest)} {metric.unit} "
        f"at {level:.0%}, over all comparisons at once ({seeds}, Holm's p "
        f"{number(one.p_holm or 0.0)})."
    )


def _of_equivalence(found: GridNumbers, one: Equivalence) -> str:
    metric, level = found.grid.file.metric, found.grid.file.level
    pair = f"{one.difference.cell} and {one.difference.reference}"
    if one.p_corrected is None:
        return f"{pair}: whether they are as good as each other cannot be said."
    p = f"two one-sided tests, corrected p {number(one.p_corrected)}"
    if one.holds(level):
        return f"{pair} are as good as each other within {number(one.margin)} {metric.unit} ({p})."
    return (
        f"{pair}: it is not shown that they are as good as each other within {number(one.margin)} "
        f"{metric.unit} ({p})."
    )


def _of_trend(found: GridNumbers, one: Trend) -> str:
    level = found.grid.file.level
    blocks = f"{len(one.seeds)} rows of {len(one.cells)} values"
    if one.least_p > 1 - level:
        return (
            f"Along {one.axis}: no trend can be shown, whatever the values: {blocks} never give a "
            f"p below {number(one.least_p)}."
        )
    way = "falls" if one.slope < 0 else "rises"
    if one.p <= 1 - level:
        return (
            f"Along {one.axis} the metric {way}, by {number(abs(one.slope))} a step (permutation "
            f"p {number(one.p)}, {blocks})."
        )
    return f"Along {one.axis} no trend was found (permutation p {number(one.p)}, {blocks})."


def _needed(found: GridNumbers) -> list[str]:
    spreads = [one.sd for one in found.differences if one.sd]
    if not spreads:
        return []
    sd = sorted(spreads)[len(spreads) // 2]
    metric, margin = found.grid.file.metric, found.grid.file.comparisons.margin
    wanted = margin or sd
    seeds = seeds_needed(sd, wanted, found.grid.file.level)
    told = "more than could be counted" if seeds is None else f"{seeds} seeds"
    return [
        f"Differences between paired runs spread by {number(sd)} {metric.unit} (the middle one of "
        f"the comparisons); to find a single difference of {number(wanted)} in four grids of five "
        f"would take {told}."
    ]


def _interval(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{low:+.3g} to {high:+.3g}"
