"""Sections of a grid file -> settings, with every mistake of the file found at once.

A grid may stand for days of computing, so a key that nobody reads must not pass, and a second
mistake must not wait for the first to be mended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from qlora_pl.errors import ConfigurationError, did_you_mean

Settings = TypeVar("Settings")


def load_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        ConfigurationError: if it cannot be read, is no YAML, names a key twice or is no mapping.
    """
    try:
        loader = _Loader(path.read_text("utf-8"))
        try:
            found = loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigurationError(f"'{path}' could not be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"'{path}' is not text in UTF-8.") from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigurationError(f"'{path}' is not YAML: {said}.") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"'{path}' holds no keys; see docs/ablations.md for a grid file.")
    return found


def section(kind: type[Settings], found: Any, place: str, problems: list[str]) -> Settings | None:
    """One section as its settings; None if anything in it is wrong.

    Args:
        kind: A frozen dataclass.
        found: What the file has.
        place: Its key, for sentences; empty for the file itself.
        problems: Sentences are added to it.
    """
    if not isinstance(found, Mapping):
        problems.append(f"{place}: expected keys and values, got {_shown(found)}.")
        return None
    before = len(problems)
    hints = get_type_hints(kind)
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    dot = f"{place}." if place else ""
    for key in found:
        if key not in known:
            end = did_you_mean(str(key), known)
            told = f" (it has {', '.join(known)})." if end == "." else end
            problems.append(f"{dot}{key}: no such key{told}")
    values = {}
    for name, one in known.items():
        if name in found:
            values[name] = _value(hints[name], found[name], f"{dot}{name}", problems)
        elif one.default is MISSING and one.default_factory is MISSING:
            problems.append(f"{dot}{name}: must be given.")
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except ConfigurationError as error:
        problems += [_placed(place, problem, known) for problem in error.problems]
        return None


def _placed(place: str, problem: str, known: Mapping[str, Any]) -> str:
    key = problem.partition(":")[0].partition(".")[0]
    return f"{place}{'.' if key in known else ': '}{problem}" if place else problem


def _value(hint: Any, found: Any, place: str, problems: list[str]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for one in arguments:
            if _is(one, found):
                return _value(one, found, place, problems)
    elif hasattr(hint, "__dataclass_fields__"):
        return section(hint, found, place, problems)
    elif origin is dict and isinstance(found, Mapping):
        return {
            str(key): _value(arguments[1], inner, f"{place}.{key}", problems)
            for key, inner in found.items()
        }
    elif origin is tuple and isinstance(found, list):
        return tuple(
            _value(arguments[0], inner, f"{place}[{number}]", problems)
            for number, inner in enumerate(found)
        )
    elif _is(hint, found):
        return float(found) if hint is float else found
    problems.append(f"{place}: expected {_named(hint)}, got {_shown(found)}.")
    return None


def _is(hint: Any, found: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return found in get_args(hint)
    if origin is tuple:
        return isinstance(found, list)
    if origin is dict or hasattr(hint, "__dataclass_fields__"):
        return isinstance(found, Mapping)
    if hint is float:
        return isinstance(found, int | float) and not isinstance(found, bool)
    if hint is int:
        return isinstance(found, int) and not isinstance(found, bool)
    return isinstance(found, hint)


def _named(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_named(one) for one in arguments)
    if origin is Literal:
        return " or ".join(f"'{one}'" for one in arguments)
    if origin is tuple:
        return f"a list of {_named(arguments[0])}"
    if origin is dict or hasattr(hint, "__dataclass_fields__"):
        return "keys and values"
    return {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
        Any: "values",
    }[hint]


def _shown(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; plain YAML takes the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 2e-4 as text; a learning rate must not depend on a dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)
