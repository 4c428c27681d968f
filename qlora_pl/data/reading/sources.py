"""Where rows come from, as a user names it: sources to be read, or rows that are in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from qlora_pl.data.reading.source_config import SourceConfig
from qlora_pl.errors import ConfigurationError, did_you_mean

__all__ = ["NO_ROWS", "RowSources", "SourceConfig"]


class RowSources:
    """The rows of a run: sources to be read, or rows that are in memory already.

    Not a dataclass, which the command line's parser would take apart into keys.
    """

    def __init__(
        self,
        sources: tuple[SourceConfig, ...] = (),
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.sources = sources
        self.rows = rows

    @classmethod
    def parse(cls, value: Any, key: str = "data.sources", allow_rows: bool = True) -> RowSources:
        """Whatever a user would write: a path, a mapping, a list of either, or rows.

        Args:
            value: A path or Hub name; a mapping with ``path``; a list of these; from Python also a
                list of rows or a ``datasets.Dataset``.
            key: The configuration key, for errors.
            allow_rows: Whether rows in memory are accepted (from Python, not from a file).

        Raises:
            ConfigurationError: naming the key and what was found.
        """
        if isinstance(value, cls):
            return value
        if value is None:
            return NO_ROWS
        if isinstance(value, str) and value[:1] in ("[", "{"):  # a list or mapping in a flag
            value = _parse_flag(value, key)
        is_dataset = hasattr(value, "column_names")
        if is_dataset and isinstance(value, dict):
            names = ", ".join(f"'{name}'" for name in value)
            raise ConfigurationError(
                f"{key}: a {type(value).__name__} holds several splits; name one of {names}."
            )
        if isinstance(value, str | Path | SourceConfig | dict):
            value = [value]
        if not isinstance(value, Sequence) and not (is_dataset and hasattr(value, "__len__")):
            raise ConfigurationError(
                f"{key}: expected a file, a Hub name or a list, got "
                f"{' '.join(repr(value).split()):.60}."
            )
        if len(value) == 0:
            raise ConfigurationError(f"{key}: the list is empty; name at least one file.")
        if allow_rows and isinstance(value[0], Mapping) and (is_dataset or _is_row(value[0])):
            return cls(rows=value)
        return cls(tuple(_parse_source(item, key) for item in value))

    def plain(self) -> Any:
        """What ``parse`` takes, in plain types, for a configuration file."""
        if self.rows is not None:
            return f"({len(self.rows)} rows in memory)"
        if not self.sources:
            return None
        defaults = SourceConfig()
        return [
            {
                f.name: _plain(getattr(source, f.name))
                for f in fields(source)
                if getattr(source, f.name) != getattr(defaults, f.name)
            }
            for source in self.sources
        ]

    def __bool__(self) -> bool:
        return bool(self.sources) or self.rows is not None

    def problems(self, key: str = "data.sources") -> list[str]:
        """Every problem that can be found without reading."""
        return [problem for source in self.sources if (problem := source.problem(key))]


NO_ROWS = RowSources()
"""No source was named."""

KEYS = [f.name for f in fields(SourceConfig)]


def _is_row(item: Mapping[str, Any]) -> bool:
    """Whether a mapping is a row rather than a source; a row may have a column ``dataset``."""
    return "path" not in item and not ("dataset" in item and set(item) <= set(KEYS))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _parse_flag(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"{key}: '{text}' is not a list that YAML reads; write [FILE, FILE]."
        ) from error


def _parse_source(item: Any, key: str) -> SourceConfig:
    if isinstance(item, SourceConfig):
        return item
    if isinstance(item, str | Path):
        return SourceConfig(path=str(item))
    if not isinstance(item, Mapping):
        raise ConfigurationError(f"{key}: expected a file or a mapping with 'path', got {item!r}.")
    for name in item:
        if name not in KEYS:
            raise ConfigurationError(
                f"{key}: a source has no setting '{name}' (known: {', '.join(KEYS)})"
                f"{did_you_mean(str(name), KEYS)}"
            )
    if not isinstance(item.get("path"), str | Path) and "dataset" not in item:
        raise ConfigurationError(f"{key}: {dict(item)!r} has no path; write path: FILE.")
    try:
        path = item.get("path", "")
        return SourceConfig(**{**item, "path": str(path) if isinstance(path, Path) else path})
    except ConfigurationError as error:  # which does not know what its source is for
        named = [problem.replace("data.sources", key, 1) for problem in error.problems]
        raise ConfigurationError(named) from error
