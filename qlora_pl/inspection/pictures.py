"""Pictures of numbers by layer and kind of module, as SVG inside of a page: maps, bars, columns.

Their colours are the page's own, so that they follow a reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH = 960
LEFT, RIGHT = 128, 14
CELL_HEIGHT, MOST_CELL_WIDTH = 26, 64
TEXT_WIDTH = 44
"""Of a cell that holds its number as text."""
PALEST = 0.06
"""Opacity of the smallest number, which a cell without one does not have."""
BAR_HEIGHT, BAR_GAP = 18, 8
COLUMN_HEIGHT = 150

Words = Callable[[float], str]


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float | None],
    words: Words,
    label: str,
) -> str:
    """A cell for each row and column, the darker the larger; those without a number are crossed.

    Args:
        rows: Kinds of module, top down.
        columns: Layers, from left to right.
        values: By row and column; what is not there stays blank, None or NaN is crossed.
        words: A number as text.
        label: For those who hear the page.
    """
    known = [v for v in values.values() if v is not None and math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    width = min((WIDTH - LEFT - RIGHT) / max(len(columns), 1), MOST_CELL_WIDTH)
    top = 24
    parts = [
        f'<text x="{LEFT - 8}" y="{top + i * CELL_HEIGHT + 17}" text-anchor="end">'
        f"{escape(row)}</text>"
        for i, row in enumerate(rows)
    ]
    step = max(1, math.ceil(30 / width))
    for j, column in enumerate(columns):
        if j % step == 0:
            x = LEFT + (j + 0.5) * width
            shown = escape(_short(column, columns[j - step] if j else None))
            parts.append(f'<text x="{x:.1f}" y="{top - 8}" text-anchor="middle">{shown}</text>')
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if (row, column) in values:
                value = values[row, column]
                x, y = LEFT + j * width, top + i * CELL_HEIGHT
                where = f"{row}, layer {column}" if column else row
                parts.append(_cell(x, y, width, value, low, high, words, where))
    floor = top + len(rows) * CELL_HEIGHT + 14
    parts += _scale(floor, low, high, words)
    return svg(parts, floor + 24, label)


def _short(column: str, before: str | None) -> str:
    """The layer's number; with its stack where that begins."""
    stack, _, number = column.rpartition(" ")
    same = before is not None and before.rpartition(" ")[0] == stack
    return number if same or not stack else f"{stack} {number}"


def _cell(
    x: float,
    y: float,
    width: float,
    value: float | None,
    low: float,
    high: float,
    words: Words,
    where: str,
) -> str:
    frame = (
        f'x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{width - 1:.1f}" height="{CELL_HEIGHT - 1}"'
    )
    if value is None or not math.isfinite(value):
        return (
            f'<rect class="none" {frame}><title>{escape(where)}: no number</title></rect>'
            f'<path class="none" d="M{x + 2:.1f} {y + 2}l{width - 4:.1f} {CELL_HEIGHT - 4}"/>'
        )
    share = (value - low) / (high - low) if high > low else 0.0
    opacity = PALEST + (1 - PALEST) * share
    told = f"<title>{escape(where)}: {escape(words(value))}</title>"
    drawn = f'<rect class="heat" {frame} fill-opacity="{opacity:.3f}">{told}</rect>'
    if width >= TEXT_WIDTH:
        kind = "inside deep" if share > 0.55 else "inside"
        drawn += (
            f'<text class="{kind}" x="{x + width / 2:.1f}" y="{y + 17}" text-anchor="middle">'
            f"{escape(words(value))}</text>"
        )
    return drawn


def _scale(y: float, low: float, high: float, words: Words) -> list[str]:
    """Which colour is which number."""
    steps, width = 24, 7
    parts = [f'<text x="{LEFT - 8}" y="{y + 10}" text-anchor="end">{escape(words(low))}</text>']
    for i in range(steps):
        opacity = PALEST + (1 - PALEST) * i / (steps - 1)
        parts.append(
            f'<rect class="heat" x="{LEFT + i * width}" y="{y}" width="{width}" height="12" '
            f'fill-opacity="{opacity:.3f}"/>'
        )
    parts.append(f'<text x="{LEFT + steps * width + 8}" y="{y + 10}">{escape(words(high))}</text>')
    return parts


def bars(
    values: Mapping[str, float],
    words: Words,
    label: str,
    marks: Mapping[str, float] | None = None,
) -> str:
    """A bar for each name, from zero, its number behind it.

    Args:
        values: By name, top down.
        words: A number as text.
        label: For those who hear the page.
        marks: A stroke across a bar: what was expected.
    """
    marks = marks or {}
    most = max([*values.values(), *marks.values()], default=0.0) or 1.0
    across = (WIDTH - LEFT - RIGHT - 90) / most
    parts = []
    for i, (name, value) in enumerate(values.items()):
        y = 4 + i * (BAR_HEIGHT + BAR_GAP)
        end = LEFT + value * across
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="count main" x="{LEFT}" y="{y}" width="{max(end - LEFT, 1):.1f}" '
            f'height="{BAR_HEIGHT}"/>',
        ]
        at = end
        if name in marks:
            x = LEFT + marks[name] * across
            at = max(end, x)
            parts.append(
                f'<line class="start" x1="{x:.1f}" y1="{y - 3}" x2="{x:.1f}" '
                f'y2="{y + BAR_HEIGHT + 3}"><title>{escape(words(marks[name]))}</title></line>'
            )
        parts.append(f'<text class="value" x="{at + 8:.1f}" y="{y + 13}">{words(value)}</text>')
    return svg(parts, 4 + len(values) * (BAR_HEIGHT + BAR_GAP), label)


def columns(values: Mapping[str, float], words: Words, label: str) -> str:
    """A column for each layer, from zero; its number under the pointer."""
    most = max(values.values(), default=0.0) or 1.0
    width = min((WIDTH - LEFT - RIGHT) / max(len(values), 1), MOST_CELL_WIDTH)
    floor = 18 + COLUMN_HEIGHT
    parts = [
        f'<text x="{LEFT - 8}" y="22" text-anchor="end">{escape(words(most))}</text>',
        f'<text x="{LEFT - 8}" y="{floor}" text-anchor="end">0</text>',
        f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{LEFT + width * len(values):.1f}" '
        f'y2="{floor}"/>',
    ]
    step = max(1, math.ceil(30 / width))
    names = list(values)
    for j, (name, value) in enumerate(values.items()):
        x, height = LEFT + j * width, max(value, 0.0) / most * COLUMN_HEIGHT
        parts.append(
            f'<rect class="count main" x="{x + 1:.1f}" y="{floor - height:.1f}" '
            f'width="{width - 2:.1f}" height="{max(height, 1):.1f}">'
            f"<title>{escape(f'layer {name}' if name else 'outside of layers')}: "
            f"{escape(words(value))}</title></rect>"
        )
        if j % step == 0:
            shown = escape(_short(name, names[j - step] if j else None))
            parts.append(
                f'<text x="{x + width / 2:.1f}" y="{floor + 16}" text-anchor="middle">'
                f"{shown}</text>"
            )
    return svg(parts, floor + 24, label)


def svg(parts: Sequence[str], height: float, label: str) -> str:
    """A picture that scrolls where the page is narrower than it can be read."""
    return (
        f'<div class="wide"><svg class="readable" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg></div>"
    )
