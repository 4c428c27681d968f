"""What is known about a key, a group or a flag, as text for a terminal and in plain types."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qlora_pl.explaining.catalogue import Catalogue, Entry

WIDTH = 98
INDENT = 12
PLAIN_FLAG = ("name", "kind", "default", "meaning", "unit", "place", "pages", "commands")

Said = tuple[str, Any]
"""Text, and the same in plain types."""


def of_key(name: str, catalogue: Catalogue) -> Said:
    """All about a key."""
    entry = catalogue.keys[name]
    related = catalogue.goes_with(name)
    *groups, leaf = name.split(".")
    has_group = name in catalogue.groups  # a source is a path, or a mapping with keys of its own
    shown = "VALUE" if entry.default == "must be set" else entry.default
    in_file = [f"{'  ' * depth}{group}:" for depth, group in enumerate(groups)]
    in_file.append(f"{'  ' * len(groups)}{leaf}: {shown}")
    owner = f"{entry.owner}, {entry.place}" if entry.owner else entry.place
    lines = [
        name,
        "",
        *_paragraph(entry.meaning),
        "",
        *_row("type", plain_text(entry.kind)),
        *_row("default", entry.default),
        *(_row("keys", f"qlora-pl explain '{name}.*'") if has_group else []),
        *(_row("unit", entry.unit) if entry.unit else []),
        *_row("in a file", *in_file),
        *_row("acts in", owner),
        *(_row("pages", *entry.pages) if entry.pages else []),
    ]
    for number, other in enumerate(related):
        first = _first_sentence(catalogue.keys[other].meaning)
        lines += _row("goes with" if number == 0 else "", f"{other}: {first}")
    plain = asdict(entry) | {"goes_with": related}
    del plain["mentions"], plain["commands"]
    return "\n".join(lines), plain


def of_group(name: str, catalogue: Catalogue) -> Said:
    """The keys of a group, and of the groups in it."""
    entries = catalogue.group(name)
    lines = [f"{name}: {plain_text(catalogue.groups[name])}", "", *_list(entries)]
    lines += ["", "qlora-pl explain KEY says more about one."]
    plain = {
        "group": name,
        "title": catalogue.groups[name],
        "keys": [{"name": e.name, "default": e.default, "meaning": e.meaning} for e in entries],
    }
    return "\n".join(lines), plain


def of_groups(catalogue: Catalogue) -> Said:
    """The groups of keys, and the commands that have flags."""
    counts = {
        group: sum(key.rpartition(".")[0] == group for key in catalogue.keys)
        for group in catalogue.groups
    }
    width = max(map(len, counts)) + 2
    lines = ["The keys of a run:", ""]
    for group, count in counts.items():
        title = plain_text(catalogue.groups[group])
        if not group:
            title += f": {', '.join(key for key in catalogue.keys if '.' not in key)}"
        lines.append(f"  {group or '(none)':{width}}{count:>3}  {title}")
    lines += [
        "",
        "qlora-pl explain GROUP lists its keys, qlora-pl explain KEY says all about one, and",
        "qlora-pl explain COMMAND the flags of a command:",
        *_wrapped(f"{', '.join(catalogue.commands())}.", WIDTH),
    ]
    plain = [{"group": g, "title": catalogue.groups[g], "keys": n} for g, n in counts.items()]
    return "\n".join(lines), plain


def of_commands(commands: Sequence[str], catalogue: Catalogue) -> Said:
    """The flags of some commands."""
    lines: list[str] = []
    found = []
    for command in commands:
        entries = [flag for flag in catalogue.flags if command in flag.commands]
        lines += [f"The flags of qlora-pl {command}:", "", *_list(entries), ""]
        found += [_plain_flag(entry) for entry in entries if entry not in found]
    lines.append(f"qlora-pl explain {commands[0]} --FLAG says more about one.")
    return "\n".join(lines), found


def of_flags(entries: Sequence[Entry]) -> Said:
    """All about a flag, one part for each of its meanings."""
    parts = []
    for entry in entries:
        parts += [
            f"{entry.name} of qlora-pl {', '.join(entry.commands)}",
            "",
            *_paragraph(entry.meaning),
            "",
            *_row("type", plain_text(entry.kind)),
            *_row("default", entry.default),
            *(_row("unit", entry.unit) if entry.unit else []),
            *_row("acts in", *entry.place.split(", ")),
            *(_row("pages", *entry.pages) if entry.pages else []),
            "",
        ]
    return "\n".join(parts).rstrip(), [_plain_flag(entry) for entry in entries]


def _plain_flag(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if name in PLAIN_FLAG}


def _list(entries: Sequence[Entry]) -> list[str]:
    width = min(36, max(len(entry.name) for entry in entries) + 2)
    lines = []
    for entry in entries:
        text = _first_sentence(entry.meaning)
        if entry.default not in ("none", "null"):
            text += f" [{entry.default}]"
        rows = _wrapped(text, WIDTH - width)
        lines.append(f"  {entry.name:{width}}{rows[0] if rows else ''}")
        lines += [" " * (width + 2) + row for row in rows[1:]]
    return lines


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines whose names stay whole, so that they can be copied."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _paragraph(markdown: str) -> list[str]:
    text = plain_text(markdown)
    return _wrapped(text, WIDTH, "  ")


def _row(label: str, *texts: str) -> list[str]:
    lines = []
    for text in texts:
        is_short = len(text) <= WIDTH - INDENT
        lines += [text] if is_short else _wrapped(text, WIDTH - INDENT)
    labels = [label, *[""] * (len(lines) - 1)]
    return [f"  {name:{INDENT}}{line}" for name, line in zip(labels, lines, strict=True)]


def _first_sentence(meaning: str) -> str:
    text = plain_text(meaning)
    return re.split(r"(?<=[a-z)\]0-9]\.) (?=[A-Z])", text, maxsplit=1)[0]


def plain_text(markdown: str) -> str:
    """Markdown as a terminal shows it: without backticks, links by their words."""
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r"docs/\2", markdown.replace("\\|", "|"))
    return text.replace("`", "")
