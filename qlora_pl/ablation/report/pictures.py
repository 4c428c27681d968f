"""Pictures of a grid, as SVG in the page's own colours: differences, curves, quality and cost.

Numbers that a picture cannot show (a run without a value) are named in the tables beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import mean

from qlora_pl.ablation.report.axes import Scale, scale_over, tick_words
from qlora_pl.ablation.report.numbers import CellNumbers, RunNumbers
from qlora_pl.ablation.statistics.differences import Difference
from qlora_pl.inspection.pictures import WIDTH, svg

ROW_HEIGHT = 26
PLOT_HEIGHT = 300
RIGHT = 24
COLOURS = 8
"""Kinds of line; more cells repeat them, and are told apart by their names under the pointer."""


def forest(differences: Sequence[Difference], unit: str, better: str, level: float) -> str:
    """A row for each paired difference: seeds as dots, both intervals, zero as a line.

    Args:
        differences: Those with an interval are drawn.
        unit: Of the metric.
        better: ``lower`` or ``higher``.
        level: Of confidence.
    """
    shown = [one for one in differences if one.values]
    left = 16 + 7 * max((len(one.cell) for one in shown), default=0)
    numbers = [0.0]
    for one in shown:
        numbers += [*one.values, *(one.simultaneous or ())]
    scale = scale_over(numbers, left, WIDTH - RIGHT)
    bottom = 30 + ROW_HEIGHT * len(shown)
    parts = _bottom_axis(scale, 16, bottom, f"difference in {unit}; {better} is better")
    zero = scale.at(0.0)
    parts.append(f'<line class="zero" x1="{zero:.1f}" y1="16" x2="{zero:.1f}" y2="{bottom}"/>')
    for place, one in enumerate(shown):
        y = 30 + ROW_HEIGHT * place + ROW_HEIGHT / 2
        parts.append(
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(one.cell)}</text>'
        )
        said = escape(_told(one, level))
        kind = "differs" if one.differs(level) else "alike"
        for interval, height in ((one.simultaneous, 2), (one.single, 6)):
            if interval is not None:
                low, high = (scale.at(value) for value in interval)
                parts.append(
                    f'<rect class="interval {kind}" x="{low:.1f}" y="{y - height / 2}" '
                    f'width="{high - low:.1f}" height="{height}"><title>{said}</title></rect>'
                )
        parts += [
            f'<circle class="seed" cx="{scale.at(value):.1f}" cy="{y}" r="3"><title>seed {seed}: '
            f"{value:+.4g}</title></circle>"
            for seed, value in zip(one.seeds, one.values, strict=True)
        ]
        x = scale.at(one.mean)
        parts.append(
            f'<path class="mean {kind}" d="M {x:.1f} {y - 7} l 6 7 l -6 7 l -6 -7 z">'
            f"<title>{said}</title></path>"
        )
    return svg(parts, bottom + 42, "paired differences with their intervals")


def _told(one: Difference, level: float) -> str:
    if one.single is None or one.simultaneous is None:
        return f"{one.cell} - {one.reference}: {one.mean:+.4g} ({one.why_not})"
    return (
        f"{one.cell} - {one.reference}: {one.mean:+.4g}; single {level:.0%} "
        f"{one.single[0]:+.4g} to {one.single[1]:+.4g}; simultaneous "
        f"{one.simultaneous[0]:+.4g} to {one.simultaneous[1]:+.4g}"
    )


def curves(runs: Sequence[RunNumbers], key: str, label: str) -> str:
    """A line for each cell, its mean over seeds, in a band from its least to its largest.

    Args:
        runs: With the rows of their metrics.csv.
        key: The column.
        label: What it is, with its unit.
    """
    lines = {}
    for cell in dict.fromkeys(run.entry.cell for run in runs):
        own = [_points(run, key) for run in runs if run.entry.cell == cell]
        steps = sorted(set.intersection(*map(set, own))) if own and all(own) else []
        if len(steps) > 1:
            lines[cell] = [(step, [points[step] for points in own]) for step in steps]
    if not lines:
        return ""
    every = [(step, value) for line in lines.values() for step, values in line for value in values]
    left, bottom = 70, 16 + PLOT_HEIGHT
    across = Scale(min(x for x, _ in every), max(x for x, _ in every), left, WIDTH - RIGHT)
    up = scale_over([y for _, y in every], bottom, 16)
    parts = [*_bottom_axis(across, 16, bottom, "optimizer steps"), *_left_axis(up, left, label)]
    for place, (cell, line) in enumerate(lines.items()):
        colour = f"line{place % COLOURS}"
        top = " ".join(f"{across.at(x):.1f},{up.at(max(v)):.1f}" for x, v in line)
        back = " ".join(f"{across.at(x):.1f},{up.at(min(v)):.1f}" for x, v in reversed(line))
        middle = " ".join(f"{across.at(x):.1f},{up.at(mean(v)):.1f}" for x, v in line)
        title = f"<title>{escape(cell)}</title>"
        parts.append(f'<polygon class="band {colour}" points="{top} {back}">{title}</polygon>')
        parts.append(f'<polyline class="curve {colour}" points="{middle}">{title}</polyline>')
    return svg([*parts, *_legend(list(lines), bottom + 52)], bottom + 60 + _rows(len(lines)), label)


def _points(run: RunNumbers, key: str) -> dict[int, float]:
    found = {}
    for row in run.curves:
        text = row.get(key) or ""
        try:
            value = float(text)
        except ValueError:
            continue
        if math.isfinite(value):
            found[int(row["step"])] = value
    return found


def cost(
    cells: Sequence[CellNumbers], costs: Mapping[str, float], metric: str, label: str, better: str
) -> str:
    """A dot for each cell, what it costs against what it came to; those that none beats are linked.

    Args:
        cells: With their means.
        costs: By the cell's name.
        metric: What ``mean`` is, with its unit.
        label: What the cost is, with its unit.
        better: ``lower`` or ``higher``.
    """
    dots = [
        (costs[one.name], one.mean, one.name)
        for one in cells
        if one.mean is not None and one.name in costs
    ]
    if len(dots) < 2:
        return ""
    left, bottom = 70, 16 + PLOT_HEIGHT
    across = scale_over([x for x, _, _ in dots], left, WIDTH - RIGHT - 120)
    up = scale_over([y for _, y, _ in dots], bottom, 16)
    parts = [*_bottom_axis(across, 16, bottom, label), *_left_axis(up, left, metric)]
    best = unbeaten([(x, y) for x, y, _ in dots], better)
    line = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in sorted(best))
    parts.append(f'<polyline class="front" points="{line}"/>')
    taken: list[tuple[float, float]] = []
    for x, y, name in sorted(dots):
        at, height = across.at(x), up.at(y)
        kind = "main" if (x, y) in best else "other"
        parts.append(
            f'<circle class="dot {kind}" cx="{at:.1f}" cy="{height:.1f}" r="5"><title>'
            f"{escape(name)}: {x:.4g}, {y:.4g}</title></circle>"
        )
        if all(abs(height - h) > 13 or abs(at - a) > 7 * len(name) + 14 for a, h in taken):
            parts.append(f'<text x="{at + 9:.1f}" y="{height + 4:.1f}">{escape(name)}</text>')
            taken.append((at, height))
    return svg(parts, bottom + 42, f"{metric} against {label}")


def unbeaten(dots: Sequence[tuple[float, float]], better: str) -> list[tuple[float, float]]:
    """Dots that no other beats in both cost and quality (the Pareto front).

    Args:
        dots: (cost, metric).
        better: ``lower`` or ``higher``, of the metric.
    """
    sign = 1.0 if better == "lower" else -1.0
    return [
        (x, y)
        for x, y in dots
        if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in dots)
    ]


def _bottom_axis(scale: Scale, top: float, y: float, label: str) -> list[str]:
    ticks = scale.ticks()
    parts = [f'<line class="axis" x1="{scale.start}" y1="{y}" x2="{scale.end}" y2="{y}"/>']
    for tick, words in zip(ticks, tick_words(ticks), strict=True):
        x = scale.at(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{y + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle">{words}</text>')
    middle = (scale.start + scale.end) / 2
    return [
        *parts,
        f'<text x="{middle:.1f}" y="{y + 36}" text-anchor="middle">{escape(label)}</text>',
    ]


def _left_axis(scale: Scale, x: float, label: str) -> list[str]:
    ticks = scale.ticks(5)
    parts = []
    for tick, words in zip(ticks, tick_words(ticks), strict=True):
        y = scale.at(tick)
        parts.append(
            f'<line class="axis" x1="{x - 4}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
    return [*parts, f'<text x="4" y="10">{escape(label)}</text>']


def _legend(names: Sequence[str], y: float) -> list[str]:
    parts = []
    for place, name in enumerate(names):
        x, row = 70 + (place % 4) * 220, y + (place // 4) * 18
        parts.append(
            f'<rect class="key line{place % COLOURS}" x="{x}" y="{row}" width="14" height="4"/>'
        )
        parts.append(f'<text x="{x + 20}" y="{row + 6}">{escape(name)}</text>')
    return parts


def _rows(count: int) -> int:
    return 18 * math.ceil(count / 4)
