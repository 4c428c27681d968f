"""Which keys a text names, and which pages of the documentation speak of a key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

TABLE = "configuration.md"
WRITTEN_BY_THE_SAME = (TABLE, "architecture.md", "from-qlora-py.md")
"""Pages that list every key or file; naming one there says nothing."""


def mentions(name: str, text: str, names: Sequence[str]) -> list[str]:
    """The keys that a key's text names: between backticks, or by a word that no prose has.

    Args:
        name: The key.
        text: What it means, in Markdown.
        names: All keys.
    """
    group = name.rpartition(".")[0]
    siblings = {other.removeprefix(f"{group}."): other for other in names if _is_in(other, group)}
    quoted = " ".join(re.findall(r"`([^`]+)`", text))
    words = re.findall(r"[a-z]\w*(?:\.\w+)*", quoted)
    words += [w for w in re.findall(r"[a-z]\w*(?:\.\w+)*", text) if "_" in w.strip("_")]
    found = dict.fromkeys(key for word in words if (key := _resolve(word, siblings, names)))
    found.pop(name, None)
    return list(found)


def _is_in(name: str, group: str) -> bool:
    return bool(group) and name.startswith(f"{group}.")


def _resolve(word: str, siblings: dict[str, str], names: Sequence[str]) -> str:
    """The key that a word stands for; "" if it is none, or could be several."""
    if word in siblings:
        return siblings[word]
    if word in names:
        return word
    if "." not in word:
        return ""
    ends = [name for name in names if name.endswith(f".{word}")]
    return ends[0] if len(ends) == 1 else ""


def pages(docs: Path | None, names: Sequence[str]) -> dict[str, list[str]]:
    """Where the documentation speaks of each key, as ``page.md, "Heading"``; its own row first.

    Args:
        docs: Its folder; None: no page is found.
        names: All keys.
    """
    found: dict[str, dict[str, None]] = {name: {} for name in names}
    for name, heading in _rows(docs) if docs else []:
        found[name][f'docs/{TABLE}, "{heading}"'] = None
    for page in sorted(docs.glob("*.md")) if docs else []:
        if page.name in WRITTEN_BY_THE_SAME:
            continue
        for heading, text in sections(page.read_text(encoding="utf-8")):
            words = set(re.findall(r"\w+(?:\.\w+)+", text))
            for name in names:
                ends = {name, *([name.partition(".")[2]] if name.count(".") > 1 else [])}
                if words & ends:
                    found[name][f"docs/{page.name}" + (f', "{heading}"' if heading else "")] = None
    return {name: list(places) for name, places in found.items()}


def _rows(docs: Path) -> Iterator[tuple[str, str]]:
    """The keys in the page of all keys, each with its heading there."""
    for heading, text in sections((docs / TABLE).read_text(encoding="utf-8")):
        prefix = "data.sources." if heading.startswith("A source") else ""
        for name in re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE):
            yield prefix + name, heading


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The headings below a page's title, each with what stands under it."""
    heading, lines = "", list[str]()
    is_code = False
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        if not is_code and (found := re.match(r"##+ (.*)", line)):
            yield heading, "\n".join(lines)
            heading, lines = found[1].replace("`", ""), []
        else:
            lines.append(line)
    yield heading, "\n".join(lines)
