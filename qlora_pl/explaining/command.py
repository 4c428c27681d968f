"""``qlora-pl explain KEY``: what a key means, its default, where it acts and what it goes with."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.explaining.catalogue import Catalogue, Entry, load

HELP = """usage: qlora-pl explain [KEY | GROUP | [COMMAND] --FLAG] [--json]

  qlora-pl explain                       the groups of keys
  qlora-pl explain model.lora            the keys of a group
  qlora-pl explain model.lora.r          one key; lora.r or r will do where only one ends so
  qlora-pl explain merge --threshold     a flag of another command, or of all that have it

Says what it means, its type, default and unit, the class and file where it acts, the pages that
speak of it, and the keys that it goes with: those that its text names, and those whose texts name
it. The texts are those of docs/configuration.md. The first call reads every key, which takes some
seconds; later ones answer at once. A key that does not exist: the nearest names, exit code 2.

flags:
  --json        the same as JSON"""
WIDTH = 98
INDENT = 12


def explain(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``explain``.

    Raises:
        ConfigurationError: if no key is called so, or several are.
    """
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    asked = [word for word in words if word != "--json"]
    catalogue = load()
    text, plain = answer(asked, catalogue)
    print(json.dumps(plain, indent=2, ensure_ascii=False) if "--json" in words else text)
    return 0


def answer(asked: Sequence[str], catalogue: Catalogue) -> tuple[str, Any]:
    """What there is to say, as text and in plain types.

    Args:
        asked: Nothing, a key, a group, a flag, or a command and its flag.
        catalogue: What is known.

    Raises:
        ConfigurationError: if it is about nothing that there is, or about several things.
    """
    if not asked:
        return _groups(catalogue)
    commands = {command for flag in catalogue.flags for command in flag.commands}
    command, rest = "", list(asked)
    if rest[0] in commands:
        command, *rest = rest
    if len(rest) > 1:
        raise ConfigurationError(f"explain: one key at a time, got {' '.join(rest)}.")
    if not rest:
        return _flags_of(command, catalogue)
    if command:
        return _flag(rest[0], command, catalogue)
    name = re.sub(r"\.?\*$|\.$|\+$", "", rest[0].partition("=")[0].lstrip("-"))
    if name in catalogue.keys and not rest[0].endswith("*"):
        return _key(name, catalogue)
    if name in catalogue.groups and name:
        return _group(name, catalogue)
    is_flag = rest[0].startswith("--") and "." not in rest[0]
    if is_flag and any(flag.name == _spelt(rest[0]) for flag in catalogue.flags):
        return _flag(rest[0], "", catalogue)
    keys = [key for key in catalogue.keys if key.endswith(f".{name}")]
    groups = [group for group in catalogue.groups if group.endswith(f".{name}")]
    if len(keys) == 1:
        return _key(keys[0], catalogue)
    if not keys and len(groups) == 1:
        return _group(groups[0], catalogue)
    if keys or groups:
        raise ConfigurationError(
            f"explain: '{name}' is the end of {_listed([*keys, *groups])}; name one of them."
        )
    raise ConfigurationError(_unknown(name, catalogue))


def _unknown(name: str, catalogue: Catalogue) -> str:
    """A sentence with the nearest names, whole ones and ends of as many parts."""
    parts = name.count(".") + 1
    ends: dict[str, list[str]] = {}
    for known in [*catalogue.keys, *filter(None, catalogue.groups)]:
        for end in {known, ".".join(known.split(".")[-parts:])}:
            ends.setdefault(end, []).append(known)
    flags = {flag.name[2:]: flag for flag in catalogue.flags}
    near = get_close_matches(name, [*ends, *flags], n=3, cutoff=0.6)
    names = dict.fromkeys(
        full
        for end in near
        for full in ends.get(end) or [f"{flags[end].commands[0]} {flags[end].name}"]
    )
    if not names:
        return f"explain: no key is called '{name}'; qlora-pl explain lists the groups of keys."
    return f"explain: no key is called '{name}'; did you mean {' or '.join(list(names)[:4])}?"


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} names ({', '.join(names)})"


def _spelt(flag: str) -> str:
    return "--" + flag.partition("=")[0].lstrip("-").replace("_", "-")


def _key(name: str, catalogue: Catalogue) -> tuple[str, Any]:
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
        *_row("pages", f'docs/configuration.md, "{".".join(groups)}"', *entry.pages),
    ]
    for number, other in enumerate(related):
        first = _first_sentence(catalogue.keys[other].meaning)
        lines += _row("goes with" if number == 0 else "", f"{other}: {first}")
    plain = asdict(entry) | {"goes_with": related}
    del plain["mentions"], plain["commands"]
    return "\n".join(lines), plain


def _group(name: str, catalogue: Catalogue) -> tuple[str, Any]:
    entries = catalogue.group(name)
    lines = [f"{name}: {plain_text(catalogue.groups[name])}", "", *_list(entries)]
    lines += ["", "qlora-pl explain KEY says more about one."]
    plain = {
        "group": name,
        "title": catalogue.groups[name],
        "keys": [{"name": e.name, "default": e.default, "meaning": e.meaning} for e in entries],
    }
    return "\n".join(lines), plain


def _groups(catalogue: Catalogue) -> tuple[str, Any]:
    counts = {
        group: sum(key.rpartition(".")[0] == group for key in catalogue.keys)
        for group in catalogue.groups
    }
    width = max(map(len, counts)) + 2
    lines = ["The keys of a run:", ""]
    for group, count in counts.items():
        label = group or "(no group)"
        title = plain_text(catalogue.groups[group])
        lines.append(f"  {label:{width}}{count:>3}  {title}")
    commands = dict.fromkeys(c for flag in catalogue.flags for c in flag.commands)
    lines += [
        "",
        "qlora-pl explain GROUP lists its keys, qlora-pl explain KEY says all about one, and",
        f"qlora-pl explain COMMAND --FLAG about a flag of {', '.join(commands)}.",
    ]
    plain = [{"group": g, "title": catalogue.groups[g], "keys": n} for g, n in counts.items()]
    return "\n".join(lines), plain


def _flags_of(command: str, catalogue: Catalogue) -> tuple[str, Any]:
    entries = [flag for flag in catalogue.flags if command in flag.commands]
    lines = [f"The flags of qlora-pl {command}:", "", *_list(entries)]
    return "\n".join(lines), [_plain_flag(entry) for entry in entries]


def _flag(word: str, command: str, catalogue: Catalogue) -> tuple[str, Any]:
    known = [flag for flag in catalogue.flags if not command or command in flag.commands]
    spelt = _spelt(word)
    entries = [flag for flag in known if flag.name == spelt]
    if not entries:
        near = get_close_matches(spelt, [flag.name for flag in known], n=3)
        end = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else "."
        raise ConfigurationError(f"explain: {command} has no flag {spelt}{end}")
    parts = []
    for entry in entries:
        parts += [
            f"{entry.name} of qlora-pl {', '.join(entry.commands)}",
            "",
            *_paragraph(entry.meaning),
            "",
            *_row("type", plain_text(entry.kind)),
            *_row("default", entry.default),
            "",
        ]
    return "\n".join(parts).rstrip(), [_plain_flag(entry) for entry in entries]


def _plain_flag(entry: Entry) -> dict[str, Any]:
    names = ("name", "kind", "default", "meaning", "commands")
    return {name: value for name, value in asdict(entry).items() if name in names}


def _list(entries: Sequence[Entry]) -> list[str]:
    width = min(36, max(len(entry.name) for entry in entries) + 2)
    lines = []
    for entry in entries:
        text = _first_sentence(entry.meaning)
        if entry.default not in ("none", "null"):
            text += f" [{entry.default}]"
        rows = textwrap.wrap(text, WIDTH - width)
        lines.append(f"  {entry.name:{width}}{rows[0] if rows else ''}")
        lines += [" " * (width + 2) + row for row in rows[1:]]
    return lines


def _paragraph(markdown: str) -> list[str]:
    text = plain_text(markdown)
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _row(label: str, *texts: str) -> list[str]:
    lines = []
    for text in texts:
        is_short = len(text) <= WIDTH - INDENT
        lines += [text] if is_short else textwrap.wrap(text, WIDTH - INDENT)
    labels = [label, *[""] * (len(lines) - 1)]
    return [f"  {name:{INDENT}}{line}" for name, line in zip(labels, lines, strict=True)]


def _first_sentence(meaning: str) -> str:
    text = plain_text(meaning)
    return re.split(r"(?<=[a-z)\]0-9]\.) (?=[A-Z])", text, maxsplit=1)[0]


def plain_text(markdown: str) -> str:
    """Markdown as a terminal shows it: without backticks, links by their words."""
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r"docs/\2", markdown.replace("\\|", "|"))
    return text.replace("`", "")
