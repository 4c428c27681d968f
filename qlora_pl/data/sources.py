"""A local file, a dataset of the Hub, or rows in memory -> raw rows, each with its place.

Local files are read by line or record here rather than through ``datasets``, because a bad row must
be named by file and number, and no value may change its type on the way (dates, nulls, numbers).
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qlora_pl.data.formats import FORMATS
from qlora_pl.errors import ConfigurationError, DatasetFormatError

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
    """What the columns mean (see FORMATS); None: guessed from their names, and reported."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames before reading, NEW: OLD, for example {output: response}."""
    limit: int | None = None
    """Read only the first so many rows; None: all."""

    def __post_init__(self) -> None:
        problems = []
        if self.format is not None and self.format not in FORMATS:
            problems.append(
                f"data.sources ({self.path}): no format is called '{self.format}'"
                f"{nearest(self.format, FORMATS)}."
            )
        if self.limit is not None and not isinstance(self.limit, int):
            problems.append(
                f"data.sources ({self.path}): limit must be a whole number, got {self.limit!r}."
            )
        elif self.limit is not None and self.limit < 1:
            problems.append(
                f"data.sources ({self.path}): limit must be at least 1, got {self.limit}."
            )
        if not isinstance(self.columns, dict) or not all(
            isinstance(name, str) for name in (*self.columns, *self.columns.values())
        ):
            problems.append(
                f"data.sources ({self.path}): columns must be {{NEW: OLD}}, got {self.columns!r}."
            )
        if problems:
            raise ConfigurationError(problems)

    @property
    def is_local(self) -> bool:
        """Whether this names a file rather than a dataset of the Hub."""
        return Path(self.path).suffix.lower() in SUFFIXES or Path(self.path).exists()

    def problem(self, key: str = "data.sources") -> str | None:
        """One sentence on why this cannot be read, found without reading it; or None."""
        path = Path(self.path).expanduser()
        if not self.is_local:
            if self.path.count("/") > 1 or self.path.startswith((".", "/", "~")):
                return f"{key}: no file '{self.path}'."
            return None
        if path.is_dir():
            return f"{key}: '{self.path}' is a folder; name a file in it."
        if not path.exists():
            names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            return f"{key}: no file '{self.path}'{nearest(path.name, names)}."
        if path.suffix.lower() not in SUFFIXES:
            return f"{key}: '{self.path}' is none of {', '.join(SUFFIXES)}."
        return None


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of the known words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


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
                f"{key}: a source has no setting '{name}'{nearest(str(name), known)} "
                f"(known: {', '.join(known)})."
            )
    if not isinstance(item.get("path"), str | Path):
        raise ConfigurationError(f"{key}: {dict(item)!r} has no path; write path: FILE.")
    return SourceConfig(**{**item, "path": str(item["path"])})


class Place(NamedTuple):
    """Where a row came from; ``row`` counts from 1, as editors do."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


def read_rows(
    sources: RowSources,
) -> Iterator[tuple[Place, SourceConfig | None, Mapping[str, Any]]]:
    """Every row with its place, in order, one at a time.

    Raises:
        DatasetFormatError: naming file and row, if a file is not what its suffix says.
    """
    if sources.rows is not None:
        for number, row in enumerate(sources.rows, start=1):
            place = Place("rows in memory", number)
            yield place, None, _mapping(row, place)
        return
    for source in sources.sources:
        columns: set[str] = set()
        for number, row in itertools.islice(_numbered_rows(source), source.limit):
            place = Place(source.path, number)
            columns.update(_mapping(row, place))
            yield place, source, _rename(row, source)
        for new, old in source.columns.items():
            if columns and old not in columns:
                found = ", ".join(f"'{name}'" for name in sorted(columns))
                raise DatasetFormatError(
                    f"{source.path}: no row has a column '{old}', which columns renames to "
                    f"'{new}'; found {found}."
                )


def _mapping(row: Any, place: Place) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DatasetFormatError(f"{place}: expected a mapping of columns, got {row!r:.60}.")
    return row


def _rename(row: Mapping[str, Any], source: SourceConfig) -> Mapping[str, Any]:
    """A renamed column replaces one that had its name; a row without it keeps what it has."""
    renamed = {new: row[old] for new, old in source.columns.items() if old in row}
    olds = source.columns.values()
    return {name: value for name, value in row.items() if name not in olds} | renamed


def _numbered_rows(source: SourceConfig) -> Iterator[tuple[int, Any]]:
    path = Path(source.path).expanduser()
    if problem := source.problem():
        raise ConfigurationError(problem)
    if not source.is_local:
        return enumerate(_hub_rows(source), start=1)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _jsonl(path)
    return enumerate({".json": _json, ".csv": _csv, ".parquet": _parquet}[suffix](path), start=1)


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):  # blank lines count, as in an editor
            if line.strip():
                yield number, _decode(line, f"{path}, row {number}")


def _json(path: Path) -> Iterable[Any]:
    rows = _decode(path.read_bytes(), str(path))
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list):
        raise DatasetFormatError(f"{path}: expected a list of rows, got {type(rows).__name__}.")
    return rows


def _decode(data: bytes, place: str) -> Any:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise DatasetFormatError(f"{place}: not UTF-8 (byte {error.start}); convert it.") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""  # of a .jsonl, always the first
        hint = "; name a file with one row a line .jsonl" if line and "Extra" in error.msg else ""
        raise DatasetFormatError(
            f"{place}: not JSON ({error.msg}, {line}column {error.colno}){hint}."
        ) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting that Python refuses
        raise DatasetFormatError(f"{place}: not JSON that can be read ({error}).") from error


def _csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of 131,073 characters
    # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: a quote that is never closed would swallow the rest of the file as one cell
        reader = csv.DictReader(file, strict=True)
        number = 0
        try:
            names = list(reader.fieldnames or [])
            if twice := [name for name in names if names.count(name) > 1]:
                raise DatasetFormatError(f"{path}: its header has the column '{twice[0]}' twice.")
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise DatasetFormatError(
                        f"{path}, row {number}: its number of cells differs from the header's; "
                        "quote the cells that contain a comma."
                    )
                yield row
        except UnicodeDecodeError as error:
            raise DatasetFormatError(
                f"{path}: not UTF-8 (byte {error.start}); convert it."
            ) from error
        except csv.Error as error:
            raise DatasetFormatError(
                f"{path}, row {number + 1}: not CSV ({error}); double the quotes inside a cell."
            ) from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:  # the second for pages that are damaged
        raise DatasetFormatError(f"{path}: not Parquet ({str(error).splitlines()[0]}).") from error


def _hub_rows(source: SourceConfig) -> Iterable[Any]:
    import datasets  # slow to import

    try:
        return datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision
        )
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DatasetFormatError(
            f"data.sources: dataset '{source.path}' (split '{source.split}') could not be loaded: "
            f"{reason}"
        ) from error


def hub_splits(source: SourceConfig) -> list[str]:
    """The names of a Hub dataset's splits; empty for local files."""
    if source.is_local:
        return []
    import datasets  # slow to import

    try:
        return list(
            datasets.get_dataset_split_names(source.path, source.subset, revision=source.revision)
        )
    except Exception:  # _hub_rows gives the sentence; here it only means that nothing is known
        return []
