"""Where rows come from, as a user names it: a file, a dataset of the Hub, or rows in memory.

What is named is checked here without being read; ``readers`` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from qlora_pl.data.formats import FORMATS
from qlora_pl.errors import ConfigurationError, did_you_mean

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where rows come from."""

    path: str
    """A local file (.json, .jsonl, .csv, .parquet) or the name of a dataset on the Hub."""
    split: str = "train"
    """The split to read of a Hub dataset; local files have none."""
    subset: str | None = None
    """The configuration of a Hub dataset; None: its only or default one."""
    revision: str | None = None
    """The commit or tag of a Hub dataset; None: the newest."""
    format: str | None = None
    """What the columns mean: messages, sharegpt, alpaca, prompt-response, prompt-completion,
    question-answer, input-output, text or guanaco; None: guessed from their names, and reported."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames before reading, NEW: OLD, for example {output: response}."""
    limit: int | None = None
    """Read only the first so many rows; None: all."""

    def __post_init__(self) -> None:
        if problems := list(self._wrong_values()):
            raise ConfigurationError(f"data.sources ({self.path}): {text}" for text in problems)

    def _wrong_values(self) -> Iterator[str]:
        for name in ("split", "subset", "revision", "format"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "split" or value is not None):
                yield f"{name} must be text, got {value!r}."
        if isinstance(self.format, str) and self.format not in FORMATS:
            yield (f"no format is called '{self.format}'{did_you_mean(self.format, FORMATS)}")
        if self.limit is not None and (
            not isinstance(self.limit, int) or isinstance(self.limit, bool)
        ):
            yield f"limit must be a whole number, got {self.limit!r}."
        elif self.limit is not None and self.limit < 1:
            yield f"limit must be at least 1, got {self.limit}."
        if not isinstance(self.columns, dict) or not all(
            isinstance(name, str) for name in (*self.columns, *self.columns.values())
        ):
            yield f"columns must be {{NEW: OLD}}, got {self.columns!r}."

    @property
    def is_local(self) -> bool:
        """Whether this names a file rather than a dataset of the Hub."""
        return Path(self.path).suffix.lower() in SUFFIXES or Path(self.path).exists()

    def problem(self, key: str = "data.sources") -> str | None:
        """One sentence on why this cannot be read, found without reading it; or None."""
        path = Path(self.path).expanduser()
        if not self.path.strip():
            return f"{key}: the path is empty; name a file."
        if not self.is_local:
            if self.path.count("/") > 1 or self.path.startswith((".", "/", "~")):
                return f"{key}: no file '{self.path}'."
            return None
        if path.is_dir():
            return f"{key}: '{self.path}' is a folder; name a file in it."
        if not path.exists():
            names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            return f"{key}: no file '{self.path}'{did_you_mean(path.name, names)}"
        if path.suffix.lower() not in SUFFIXES:
            return f"{key}: '{self.path}' is none of {', '.join(SUFFIXES)}."
        return self._idle_setting(key)

    def _idle_setting(self, key: str) -> str | None:
        """A setting of Hub datasets that a file would take in silence."""
        for name, default in (("split", "train"), ("subset", None), ("revision", None)):
            if (value := getattr(self, name)) != default:
                return (
                    f"{key}: {name} '{value}' is for datasets of the Hub, '{self.path}' is a file "
                    "and has none; remove it, or name the file that holds those rows."
                )
        return None


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
        is_row = isinstance(value[0], Mapping) and (is_dataset or "path" not in value[0])
        if allow_rows and is_row:
            return cls(rows=value)
        return cls(tuple(_parse_source(item, key) for item in value))

    def plain(self) -> Any:
        """What ``parse`` takes, in plain types, for a configuration file."""
        if self.rows is not None:
            return f"({len(self.rows)} rows in memory)"
        if not self.sources:
            return None
        defaults = SourceConfig(path="")
        return [
            {
                f.name: getattr(source, f.name)
                for f in fields(source)
                if f.name == "path" or getattr(source, f.name) != getattr(defaults, f.name)
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
    known = [f.name for f in fields(SourceConfig)]
    for name in item:
        if name not in known:
            raise ConfigurationError(
                f"{key}: a source has no setting '{name}' (known: {', '.join(known)})"
                f"{did_you_mean(str(name), known)}"
            )
    if not isinstance(item.get("path"), str | Path):
        raise ConfigurationError(f"{key}: {dict(item)!r} has no path; write path: FILE.")
    try:
        return SourceConfig(**{**item, "path": str(item["path"])})
    except ConfigurationError as error:  # which does not know what its source is for
        named = [problem.replace("data.sources", key, 1) for problem in error.problems]
        raise ConfigurationError(named) from error
