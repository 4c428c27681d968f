"""Tables, lists and quotations in HTML; what is not named as HTML here is escaped here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from qlora_pl.data.reading.places import Place

INVISIBLE = re.compile("[\x7f-\xa0\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
"""Characters that a reader would miss, or that change how others are shown."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], chosen: Sequence[bool] = ()) -> str:
    """Cells are HTML already; columns whose name begins with # are numbers."""
    kinds = [' class="number"' if name.startswith("#") else "" for name in head]
    names = "".join(
        f"<th{kind}>{escape(name.lstrip('#'))}</th>" for kind, name in zip(kinds, head, strict=True)
    )
    lines = []
    for place, row in enumerate(rows):
        mark = ' class="chosen"' if place < len(chosen) and chosen[place] else ""
        cells = "".join(
            f"<td{kind}>{f'{cell:,}' if isinstance(cell, int) else cell}</td>"
            for kind, cell in zip(kinds, row, strict=True)
        )
        lines.append(f"<tr{mark}>{cells}</tr>")
    return (
        f'<div class="wide"><table>\n<thead><tr>{names}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def bullets(items: Iterable[str]) -> str:
    """A list of items that are HTML already."""
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def places(places: Sequence[Place], total: int) -> str:
    """Places by their source, and how many more there are."""
    rows: dict[str, list[str]] = {}
    for place in places:
        rows.setdefault(place.source, []).append(str(place.row))
    more = f" and {total - len(places):,} more" if total > len(places) else ""
    told = (f"{escape(source)}: {', '.join(numbers)}" for source, numbers in rows.items())
    return "<br>".join(told) + more


def excerpt(text: str) -> str:
    """Quoted, with what would be invisible spelled out."""
    quoted = json.dumps(text, ensure_ascii=False)
    return escape(INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted))


def emphasised(text: str) -> str:
    """A name in a heading."""
    return f"<em>{escape(text)}</em>"


def as_code(value: Any) -> str:
    """A setting; tokens come as a mapping to their ids."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"<code>{escape(str(n))}</code> ({v})" for n, v in value.items())
    return f"<code>{escape(str(value))}</code>"
