"""From a mistake in a file or flag to one sentence with the nearest right spelling.

jsonargparse stops at the first unknown key and words its errors for programmers; this looks at all
keys first, and rewords the rest.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qlora_pl.errors import ConfigurationError


def unknown_keys(parser: Any, words: list[str]) -> list[str]:
    """One sentence for each key, of files and flags, that the parser does not have.

    Args:
        parser: The parser of one command.
        words: What follows the command.

    Raises:
        ConfigurationError: if a file is missing or is not YAML.
    """
    known = {action.dest for action in parser._actions}
    problems = []
    for place, word in enumerate(words):
        if not word.startswith("-") or re.fullmatch(r"-\d.*", word):
            continue
        flag, _, value = word.partition("=")
        key = flag.lstrip("-").removesuffix("+")
        if flag in ("-c", "--config"):
            path = value or (words[place + 1] if place + 1 < len(words) else "")
            problems += [f"{path}: {sentence}" for sentence in _unknown(_keys(_load(path)), known)]
        elif flag not in ("-h", "--help") and not key.startswith("print_config"):
            problems += [f"{sentence}" for sentence in _unknown(iter([key]), known)]
    return problems


def _load(path: str) -> Any:
    file = Path(path)
    if not path or not file.is_file():
        names = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ConfigurationError(f"--config: no file '{path}'{_nearest(file.name, names)}.")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not text"
        raise ConfigurationError(f"{path}{where}: not YAML ({problem}).") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigurationError(f"{path}: expected keys and values, got {type(content).__name__}.")
    return content or {}


def _keys(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{str(key).removesuffix('+')}"
        yield name
        if isinstance(value, dict):
            yield from _keys(value, f"{name}.")


def _unknown(keys: Iterator[str], known: set[str]) -> Iterator[str]:
    groups = {prefix for name in known for prefix in _prefixes(name)}
    reported: list[str] = []
    for key in keys:
        inside = any(parent in known or parent in reported for parent in _prefixes(key))
        if key in known or key in groups or inside:
            continue
        reported.append(key)
        yield _no_such_key(key, known)


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _no_such_key(key: str, known: set[str]) -> str:
    group, _, leaf = key.rpartition(".")
    siblings = {
        name.removeprefix(f"{group}." if group else "").split(".")[0]
        for name in known
        if not group or name.startswith(f"{group}.")
    }
    where = f"'{group}'" if group else "a run"
    hint = _nearest(leaf, sorted(siblings))
    if not hint:  # right word, wrong group
        homes = sorted(name for name in known if name.rpartition(".")[2] == leaf)
        hint = (
            f"; did you mean '{homes[0]}'?" if homes else f" (it has {', '.join(sorted(siblings))})"
        )
    return f"{where} has no key '{leaf}'{hint}".rstrip("?.") + (
        "?" if "did you mean" in hint else "."
    )


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def explain_parser_error(message: str) -> str:
    """Jsonargparse's message as one sentence that names key and value."""
    return message
