"""The two drawings of the page, as SVG inside of it: lengths, and the first batch."""

from __future__ import annotations

from html import escape

from qlora_pl.inspection.data.first_batch import BatchPicture
from qlora_pl.inspection.data.numbers import Lengths

WIDTH = 960
HEIGHT = 220
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 26, 28
LINES_SHOWN = 64
LINE_HEIGHT = 14


def histogram(lengths: Lengths, max_length: int | None) -> str:
    """Rows by their number of tokens, with the cut-off; bars beyond it are in another colour.

    Args:
        lengths: Of the rows.
        max_length: The cut-off; None: there is no single one.
    """
    width = lengths.edges[1] - lengths.edges[0]
    end = max(lengths.edges[-2] + width, (max_length or 0) + 1)
    across = (WIDTH - LEFT - RIGHT) / end
    most = max(max(lengths.counts), 1)
    floor = HEIGHT - BOTTOM
    up = (floor - TOP) / most
    parts = [
        f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{WIDTH - RIGHT}" y2="{floor}"/>',
        f'<text x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">{most:,}</text>',
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">0</text>',
    ]
    for first, after, count in zip(
        lengths.edges[:-1], lengths.edges[1:], lengths.counts, strict=True
    ):
        if not count:
            continue
        height = max(count * up, 1.5)  # a single row must not vanish
        is_over = max_length is not None and first > max_length
        kind = "count over" if is_over else "count"
        title = f"{first:,} to {after - 1:,} tokens: {count:,} rows"
        parts.append(
            f'<rect class="{kind}" x="{LEFT + first * across:.1f}" y="{floor - height:.1f}" '
            f'width="{max(width * across - 1, 1):.1f}" height="{height:.1f}">'
            f"<title>{title}</title></rect>"
        )
    for tick in _ticks(end):
        x = LEFT + tick * across
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:,}</text>')
    if lengths.edges[-1] > lengths.edges[-2] + width:
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{floor - 8}" text-anchor="end">'
            f"{lengths.edges[-2]:,} and longer: {lengths.counts[-1]:,}</text>"
        )
    if max_length is not None:
        parts += _cut_off(LEFT + max_length * across, max_length, floor)
    return _svg(parts, HEIGHT, "Rows by their number of tokens")


def _cut_off(x: float, max_length: int, floor: int) -> list[str]:
    anchor, shift = ("end", -6) if x > WIDTH / 2 else ("start", 6)
    return [
        f'<line class="limit" x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="{floor}"/>',
        f'<text class="limit-name" x="{x + shift:.1f}" y="16" text-anchor="{anchor}">'
        f"data.max_length {max_length:,}</text>",
    ]


def batch_drawing(batch: BatchPicture) -> str:
    """One bar for each line of a batch; rows of a pack are told apart by a stroke."""
    across = (WIDTH - LEFT - RIGHT) / batch.width
    lines = batch.lines[:LINES_SHOWN]
    height = TOP + len(lines) * LINE_HEIGHT + BOTTOM
    parts = []
    for number, line in enumerate(lines):
        y = TOP + number * LINE_HEIGHT
        parts.append(
            f'<rect class="frame" x="{LEFT}" y="{y}" width="{batch.width * across:.1f}" '
            f'height="{LINE_HEIGHT - 3}"/>'
        )
        for kind, start, end in line.stretches:
            parts.append(
                f'<rect class="{escape(kind)}" x="{LEFT + start * across:.1f}" y="{y}" '
                f'width="{(end - start) * across:.1f}" height="{LINE_HEIGHT - 3}">'
                f"<title>{end - start:,} tokens {escape(kind)}</title></rect>"
            )
        for start in line.row_starts[1:]:
            x = LEFT + start * across
            parts.append(
                f'<line class="start" x1="{x:.1f}" y1="{y - 1}" x2="{x:.1f}" '
                f'y2="{y + LINE_HEIGHT - 2}"/>'
            )
        if number % 8 == 0:
            parts.append(f'<text x="{LEFT - 6}" y="{y + 10}" text-anchor="end">{number + 1}</text>')
    for tick in _ticks(batch.width):
        x = LEFT + tick * across
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick:,}</text>')
    return _svg(parts, height, "The first batch, a bar for each line")


def _ticks(end: int) -> range:
    """About eight round numbers from 0 on."""
    step = 1
    while end / step > 8:
        step = step * 2 if str(step)[0] != "2" else step * 5 // 2
    return range(0, end + 1, step)


def _svg(parts: list[str], height: int, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
