"""Sources -> raw rows, each with its place."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_pl.data.reading.cells import quote
from qlora_pl.data.reading.data_files import find_files
from qlora_pl.data.reading.places import BadRow, Place, PlacedRow, Row
from qlora_pl.data.reading.row_files import read_file
from qlora_pl.data.reading.sampling import sample_rows
from qlora_pl.data.reading.source_config import SourceConfig
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.errors import ConfigurationError, DatasetFormatError

__all__ = ["Place", "RawRows", "hub_splits", "load_hub_dataset", "read_rows"]

logger = logging.getLogger(__name__)


def read_rows(
    sources: RowSources,
) -> Iterator[tuple[Place, SourceConfig | None, Mapping[str, Any]]]:
    """Every row as it is stored, with its place, in order, one at a time.

    Raises:
        DatasetFormatError: naming file and row, if a file is not what its suffix says.
    """
    if sources.rows is not None:
        for place, row in rows_in_memory(sources.rows):
            yield place, None, _good(place, row)
    for source in sources.sources:
        rows = RawRows(source)
        for place, row in take(rows, source):
            yield place, source, _good(place, row)
        rows.check_renames()


def _good(place: Place, row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise DatasetFormatError(f"{place}: {row.reason}")
    return row


def rows_in_memory(rows: Iterable[Any]) -> Iterator[PlacedRow]:
    """Rows that were handed over from Python."""
    for number, row in enumerate(rows, start=1):
        yield Place("rows in memory", number), _mapping(row)


def take(rows: Iterable[PlacedRow], source: SourceConfig) -> Iterator[PlacedRow]:
    """The rows that ``limit`` or ``sample`` leave of a source."""
    if source.sample is None:
        yield from itertools.islice(rows, source.limit)
        return
    count = 0
    for placed in sample_rows(rows, source.sample, source.sample_seed):
        count += 1
        yield placed
    if count < source.sample:
        logger.warning("%s: sample %d, but it has %d rows", source.name, source.sample, count)


class RawRows:
    """The rows of a source with their columns renamed, bad ones in their places.

    Raises:
        ConfigurationError: if the source names nothing that can be read.
        DatasetFormatError: while reading, if a file or dataset cannot be read, or a file is empty.
    """

    def __init__(self, source: SourceConfig) -> None:
        if problem := source.problem():
            raise ConfigurationError(problem)
        self._source = source.resolved()
        self._columns: set[str] = set()

    def __iter__(self) -> Iterator[PlacedRow]:
        for place, row in _places(self._source):
            row = _mapping(row)
            if not isinstance(row, BadRow):
                self._columns.update(row)
                row = _rename(row, self._source.columns)
            yield place, row

    def check_renames(self) -> None:
        """Refuse a rename of a column that no row had, of those that were read."""
        for new, old in self._source.columns.items():
            if self._columns and old not in self._columns:
                found = ", ".join(f"{name!r:.60}" for name in sorted(self._columns, key=str))
                raise DatasetFormatError(
                    f"{self._source.name}: no row has a column '{old}', which columns renames to "
                    f"'{new}'; found {found}."
                )


def _mapping(row: Any) -> Row | BadRow:
    if isinstance(row, Mapping | BadRow):
        return row
    return BadRow(f"expected a mapping of columns, got {quote(row)}. Mend or remove the row.")


def _rename(row: Row, columns: Mapping[str, str]) -> Row:
    """A renamed column replaces one that had its name; a row without it keeps what it has."""
    if not columns:
        return row
    renamed = {new: row[old] for new, old in columns.items() if old in row}
    olds = columns.values()
    return {name: value for name, value in row.items() if name not in olds} | renamed


def _places(source: SourceConfig) -> Iterator[tuple[Place, Any]]:
    if source.is_saved or not source.is_local:
        rows = _saved_rows(source) if source.is_saved else load_hub_dataset(source)
        for number, row in enumerate(rows, start=1):
            yield Place(source.path, number), row
        return
    files = find_files(source.path)
    if len(files) > 1:
        logger.info("%s: %d files, %s to %s", source.path, len(files), files[0], files[-1])
    for path in files:
        name = source.path if path == Path(source.path).expanduser() else str(path)
        number = 0
        for number, row in read_file(path, source.documents):
            yield Place(name, number), row
        if number == 0:
            raise DatasetFormatError(f"{name}: it holds no rows; leave it out, or fill it.")


# -- through datasets ----------------------------------------------------------------------------


def _saved_rows(source: SourceConfig) -> Any:
    import datasets  # slow to import

    try:
        loaded = datasets.load_from_disk(str(Path(source.path).expanduser()))
    except Exception as error:  # as many types as there are ways to damage a folder
        raise DatasetFormatError(
            f"{source.path}: no folder that datasets can load ({_reason(error)}); save it again."
        ) from error
    if not isinstance(loaded, dict):
        if source.split != "train":
            raise DatasetFormatError(
                f"{source.path}: it holds one dataset and no split '{source.split}'; remove split."
            )
        return loaded
    if source.split not in loaded:
        names = ", ".join(f"'{name}'" for name in loaded)
        raise DatasetFormatError(
            f"{source.path}: it has no split '{source.split}'; set split to one of {names}."
        )
    return loaded[source.split]


def load_hub_dataset(source: SourceConfig) -> Any:
    """A split of a dataset of the Hub, as ``datasets`` gives it.

    Raises:
        DatasetFormatError: if it cannot be loaded, whatever the reason.
    """
    import datasets  # slow to import

    only: dict[str, Any] = {} if source.file is None else {"data_files": source.file}
    only |= {"streaming": True} if source.streaming else {}
    try:
        return datasets.load_dataset(
            source.path,
            source.subset,
            split=source.split,
            revision=source.revision,
            **only,
        )
    except Exception as error:  # the Hub client raises a dozen unrelated types
        raise DatasetFormatError(
            f"data.sources: dataset '{source.path}' (split '{source.split}') could not be loaded "
            f"({_reason(error)}); check its name and the network, or download it and name its path."
        ) from error


def hub_splits(source: SourceConfig) -> list[str]:
    """The names of the splits of a Hub dataset or of a saved one; empty for files.

    Raises:
        DatasetFormatError: if they cannot be listed.
    """
    source = source.resolved()
    if source.is_local and not source.is_saved:
        return []
    import datasets  # slow to import

    try:
        if source.is_saved:
            loaded = datasets.load_from_disk(str(Path(source.path).expanduser()))
            return list(loaded) if isinstance(loaded, dict) else []
        if source.file is not None:
            return ["train"]  # which a single file is
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
