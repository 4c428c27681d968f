"""One file -> its rows with their numbers, read by line or record.

Files are read here rather than through ``datasets``, because a bad row must be named by file and
number, and no value may change its type on the way (dates, nulls, numbers). All kinds but the list
in a .json file are streamed. A record that is broken becomes a ``BadRow`` where the next one can
still be found; otherwise the file is refused.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from qlora_pl.data.reading.compressed import open_data, refuse_something_else
from qlora_pl.data.reading.data_files import kind_of
from qlora_pl.data.reading.places import BadRow
from qlora_pl.data.reading.source_config import Documents
from qlora_pl.errors import DatasetFormatError

MAX_ROW_BYTES = 10_000_000
"""Bytes that a row may have: some 2 million tokens, beyond any ``max_length``."""
BATCH_ROWS = 256
"""Rows of a Parquet or Arrow file that are in memory at a time."""
BOM = b"\xef\xbb\xbf"

NumberedRow = tuple[int, Any]
TOO_LONG = BadRow(
    f"it is longer than {MAX_ROW_BYTES:,} bytes; split it into several rows, or remove it."
)


def read_file(path: Path, documents: Documents = "file") -> Iterator[NumberedRow]:
    """The rows of a file in order, each with its number (of its line, where rows are lines).

    Args:
        path: A file of one of the kinds of ``data_files``.
        documents: What a row of a .txt file is.

    Raises:
        DatasetFormatError: naming file and row, if the file is not what its suffix says.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        return enumerate(_parquet(path), start=1)
    if kind == ".arrow":
        return enumerate(_arrow(path), start=1)
    readers: dict[str, Callable[[BinaryIO, Path], Iterator[NumberedRow]]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": partial(_csv, delimiter=","),
        ".tsv": partial(_csv, delimiter="\t"),
        ".txt": partial(_txt, documents=documents),
    }
    return _opened(path, readers[str(kind)])


def _opened(
    path: Path, read: Callable[[BinaryIO, Path], Iterator[NumberedRow]]
) -> Iterator[NumberedRow]:
    with open_data(path) as file:
        yield from read(file, path)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | BadRow]]:
    """Lines with their numbers; one that is too long is passed over, never held."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)  # which spreadsheets and Windows write
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                pass
            yield number, TOO_LONG
        else:
            yield number, line


# -- JSON ----------------------------------------------------------------------------------------


def _jsonl(file: BinaryIO, path: Path) -> Iterator[NumberedRow]:
    for number, line in _lines(file):  # blank lines count, as in an editor
        if isinstance(line, BadRow):
            yield number, line
            continue
        if number == 1 and line.lstrip()[:1] == b"[":
            raise DatasetFormatError(
                f"{path}: it begins with a list; name a file that is one list of rows .json."
            )
        if line.strip():
            row = _decode(line)
            if isinstance(row, BadRow) and not line.endswith(b"\n"):
                row = BadRow(
                    f"{row.reason[:-1]}; the file ends in the middle of it, so it may be cut off."
                )
            yield number, row


def _json(file: BinaryIO, path: Path) -> Iterator[NumberedRow]:
    rows = _decode(file.read().removeprefix(BOM))
    if isinstance(rows, BadRow):
        raise DatasetFormatError(f"{path}: {rows.reason}")
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list):
        raise DatasetFormatError(
            f"{path}: expected a list of rows, got {type(rows).__name__}; write [ROW, ROW], or one "
            "row a line in a .jsonl file."
        )
    yield from enumerate(rows, start=1)


def _decode(data: bytes) -> Any:
    """A JSON value, or a ``BadRow`` that says why it is none."""
    try:
        return _parse(data.decode())
    except UnicodeDecodeError as error:
        return BadRow(_not_utf8(error))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""  # of a .jsonl, always the first
        hint = "name a file with one row a line .jsonl" if line and "Extra" in error.msg else ""
        return BadRow(f"not JSON ({error.msg}, {line}column {error.colno}); {hint or 'mend it'}.")
    except (ValueError, RecursionError) as error:  # a number or a nesting that Python refuses
        return BadRow(f"not JSON that can be read ({error}); mend or remove it.")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two keys with one name, Python's parser would keep the second in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = max(names, key=names.count)
        raise ValueError(f"the key {twice!r:.60} stands there twice")
    return found


_parse = json.JSONDecoder(object_pairs_hook=_without_twins).decode


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.start}); save the file as UTF-8."


# -- CSV and TSV ---------------------------------------------------------------------------------


def _csv(file: BinaryIO, path: Path, delimiter: str) -> Iterator[NumberedRow]:
    csv.field_size_limit(MAX_ROW_BYTES)  # the default refuses a text of 131,073 characters
    number, what = 0, "TSV" if delimiter == "\t" else "CSV"
    try:
        # strict: a quote that is never closed would swallow the rest of the file as one cell
        records = csv.reader(_decoded(file), delimiter=delimiter, strict=True)
        names = next((cells for cells in records if cells), [])
        _check_header(names, path, delimiter)
        for cells in records:
            if not cells:  # an empty line
                continue
            number += 1
            if len(cells) == len(names):
                yield number, dict(zip(names, cells, strict=True))
                continue
            separator = "a tab" if delimiter == "\t" else "a comma"
            reason = (
                f"its number of cells differs from the header's ({len(cells)}, not {len(names)})"
            )
            yield number, BadRow(f"{reason}; quote the cells that contain {separator}.")
    except UnicodeDecodeError as error:
        raise DatasetFormatError(f"{path}, row {number + 1}: {_not_utf8(error)}") from error
    except csv.Error as error:
        raise DatasetFormatError(
            f"{path}, row {number + 1}: not {what} ({error}); double the quotes inside a cell, and "
            "close each quote."
        ) from error


def _decoded(file: BinaryIO) -> Iterator[str]:
    for _, line in _lines(file):
        if isinstance(line, BadRow):
            raise csv.Error(f"a line is longer than {MAX_ROW_BYTES:,} bytes")
        yield line.decode()


def _check_header(names: list[str], path: Path, delimiter: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DatasetFormatError(
            f"{path}: its header has the column '{twice[0]}' twice; rename one of the two."
        )
    if len(names) == 1:
        for other, remedy in ((";", "save it with commas"), ("\t", "end its name in .tsv")):
            if other != delimiter and other in names[0]:
                said = "tabs" if other == "\t" else f"'{other}'"
                raise DatasetFormatError(
                    f"{path}: its columns are separated by {said} ({names[0]!r:.40}); {remedy}."
                )


# -- plain text ----------------------------------------------------------------------------------


def _txt(file: BinaryIO, path: Path, documents: Documents) -> Iterator[NumberedRow]:
    """Documents as they stand, but for line ends, which become those of Unix."""
    for start, lines in _groups(file, path, documents):
        try:
            text = b"".join(lines).decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            yield start, BadRow(_not_utf8(error))
            continue
        text = text if documents == "file" else text.removesuffix("\n")
        if text.strip():
            yield start, {"text": text}


def _groups(file: BinaryIO, path: Path, documents: Documents) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of each document, with the number of its first line."""
    lines: list[bytes] = []
    start = size = 0
    for number, line in _lines(file):
        size += MAX_ROW_BYTES + 1 if isinstance(line, BadRow) else len(line)
        if isinstance(line, BadRow) or size > MAX_ROW_BYTES:
            raise DatasetFormatError(
                f"{path}, row {start or number}: a document is longer than {MAX_ROW_BYTES:,} "
                "bytes; set documents: paragraph or line, or split the file."
            )
        is_gap = documents == "paragraph" and not line.strip()
        if not is_gap:
            start = start or number
            lines.append(line)
        if lines and (is_gap or documents == "line"):
            yield start, lines
            lines, start, size = [], 0, 0
    if lines:
        yield start, lines


# -- Parquet and Arrow ---------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    def read() -> Iterator[Any]:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                batch.validate(full=True)  # damaged offsets would be followed out of the memory
                yield from batch.to_pylist()

    return _columnar(path, "Parquet", read)


def _arrow(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    def read() -> Iterator[Any]:
        with pa.memory_map(str(path)) as file:
            batches = _arrow_batches(file)
            for batch in batches:
                _check_columns(batch.schema.names, path)
                batch.validate(full=True)  # likewise
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield from batch.slice(start, BATCH_ROWS).to_pylist()

    return _columnar(path, "Arrow", read)


def _arrow_batches(file: Any) -> Iterator[Any]:
    """Of a file with an index or of a stream, which ``datasets`` writes; both are called .arrow."""
    import pyarrow as pa

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if not is_file:
        yield from pa.ipc.open_stream(file)
        return
    reader = pa.ipc.open_file(file)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _columnar(path: Path, kind: str, read: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    import pyarrow as pa

    try:
        with path.open("rb") as file:
            refuse_something_else(file.read(64), path)
        yield from read()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # OSError: damaged pages
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DatasetFormatError(
            f"{path}: not {kind} ({reason}); fetch or make the file again."
        ) from error


def _check_columns(names: Iterable[str], path: Path) -> None:
    names = list(names)
    if twice := [name for name in names if names.count(name) > 1]:
        raise DatasetFormatError(f"{path}: it has the column '{twice[0]}' twice; rename one.")
