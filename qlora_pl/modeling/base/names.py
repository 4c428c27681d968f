"""Whether a module is meant by a name, a last part or an expression that somebody wrote.

Asked of modules, and of names alone where a plan is made without any library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PATTERN = r"(.*\.)?({})$"
"""What PEFT makes of a pattern: the whole name of a module, or the end of it after a dot."""


def matches(name: str, listed: tuple[str, ...] | list[str]) -> bool:
    """Whether a module's name, or the end of it at a dot, is among those listed."""
    return any(name == entry or name.endswith(f".{entry}") for entry in listed)


def full_match(pattern: str, names: list[str]) -> list[str]:
    """The names that a regular expression matches from end to end."""
    compiled = re.compile(pattern)
    return [name for name in names if compiled.fullmatch(name)]


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern of ranks or alphas means a module, as PEFT reads it."""
    return re.match(PATTERN.format(pattern), name) is not None


def by_module(pattern: Mapping[str, Any], targets: list[str], default: Any) -> dict[str, Any]:
    """What each module gets: the value of the first pattern that fits its name, as in PEFT."""
    return {
        target: next((value for name, value in pattern.items() if fits(name, target)), default)
        for target in targets
    }
