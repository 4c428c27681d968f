"""Sources -> raw rows, each with its place.

Local files are read by line or record here rather than through ``datasets``, because a bad row must
be named by file and number, and no value may change its type on the way (dates, nulls, numbers).
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qlora_pl.data.sources import RowSources, SourceConfig
from qlora_pl.errors import ConfigurationError, DatasetFormatError


class Place(NamedTuple):
    """Where a row came from; ``row`` counts from 1, as editors do."""

    source: str
    row: int
    part: int = 0
    """Counts from 1 where a row became several."""

    def __str__(self) -> str:
        part = f", part {self.part}" if self.part else ""
        return f"{self.source}, row {self.row}{part}"


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
        number = 0
        for number, row in itertools.islice(_numbered_rows(source), source.limit):
            place = Place(source.path, number)
            columns.update(_mapping(row, place))
            yield place, source, _rename(row, source)
        if number == 0:
            raise DatasetFormatError(f"{source.path}: it holds no rows; leave it out, or fill it.")
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
            if number == 1 and line.lstrip()[:1] == b"[":
                raise DatasetFormatError(
                    f"{path}: it begins with a list; name a file that is one list of rows .json."
                )
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
        raise DatasetFormatError(
            f"data.sources: dataset '{source.path}' (split '{source.split}') could not be loaded "
            f"({_reason(error)})."
        ) from error


def hub_splits(source: SourceConfig) -> list[str]:
    """The names of a Hub dataset's splits; empty for local files.

    Raises:
        DatasetFormatError: if they cannot be listed.
    """
    if source.is_local:
        return []
    import datasets  # slow to import

    try:
        return list(
            datasets.get_dataset_split_names(source.path, source.subset, revision=source.revision)
        )
    except Exception as error:  # not "no splits": which rows validate must not depend on a network
        raise DatasetFormatError(
            f"data.sources: the splits of '{source.path}' could not be listed ({_reason(error)}); "
            "name data.val_sources."
        ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
