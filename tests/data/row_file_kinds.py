"""One list of rows as a file of every kind and compression."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from toy_tokenizers import TEXTS

from qlora_pl.data.reading.row_files import BATCH_ROWS

ROWS = [{"prompt": text, "response": text[::-1]} for text in TEXTS]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=BATCH_ROWS)
    return sink.getvalue()


def as_arrow(rows: list[dict[str, Any]], has_index: bool) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    new = pa.ipc.new_file if has_index else pa.ipc.new_stream
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)
    return sink.getvalue()


def zipped(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/", "")
        archive.writestr(f"__MACOSX/{name}", b"what a Mac adds")
        archive.writestr(f"data/{name}", data)
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    half = len(data) // 2  # two frames, as tools for large files write them
    codec = pa.Codec("zstd")
    return b"".join(codec.compress(part).to_pybytes() for part in (data[:half], data[half:]))


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": as_jsonl,
    "rows.ndjson": as_jsonl,
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "rows.csv": as_table,
    "rows.tsv": lambda rows: as_table(rows, "\t"),
    "rows.parquet": as_parquet,
    "rows.arrow": lambda rows: as_arrow(rows, has_index=True),
    "stream.arrow": lambda rows: as_arrow(rows, has_index=False),
    "rows.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "rows.csv.bz2": lambda rows: bz2.compress(as_table(rows)),
    "rows.json.xz": lambda rows: lzma.compress(json.dumps(rows).encode()),
    "rows.jsonl.zst": lambda rows: zstd(as_jsonl(rows)),
    "rows.zip": lambda rows: zipped("inner.tsv", as_table(rows, "\t")),
    "rows.jsonl.zip": lambda rows: zipped("inner.jsonl", as_jsonl(rows)),
    "ROWS.JSONL.GZ": lambda rows: gzip.compress(as_jsonl(rows)),
}
"""By the name that the file must have."""
