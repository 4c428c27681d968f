"""Bad input of every sort: each is one sentence that names file, row and remedy.

The table gives a file's name, its bytes, the row that must be named (None where there is none to
name), and words that the sentence must hold, of which the last ones are the remedy.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_pl.data.reading.compressed import FREE_BYTES
from qlora_pl.data.reading.normalizing import ReadingReport, read_conversations
from qlora_pl.data.reading.row_files import MAX_ROW_BYTES
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.errors import ConfigurationError, DatasetFormatError, QLoRAError

GOOD = {"prompt": "q", "response": "a"}


class Bad(NamedTuple):
    """One line of the table."""

    name: str
    """Of the file."""
    data: bytes | Callable[[], bytes]
    row: int | None
    words: list[str]
    settings: dict[str, Any] = {}  # noqa: RUF012 - never changed


def lines(*rows: Any, **columns: Any) -> bytes:
    """A good row, and these behind it: dictionaries, lines as they stand, or one row's columns."""
    rows = (GOOD, *rows, columns) if columns else (GOOD, *rows)
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "".join(text + "\n" for text in texts).encode()


def turns(*messages: Any) -> bytes:
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return "".join(json.dumps({"messages": m}) + "\n" for m in (good, messages)).encode()


def said(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def zipped(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def locked() -> bytes:
    """A zip file whose member says that it is encrypted."""
    data = bytearray(zipped(("rows.jsonl", lines())))
    data[6] |= 1  # the flag in the local header, ...
    data[data.index(b"PK\x01\x02") + 8] |= 1  # ... and in the directory
    return bytes(data)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data).to_pybytes()


def parquet(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


BOMB = (b" " * 1023 + b"\n") * (FREE_BYTES // 1024 + 1024)
CUT = lines(GOOD, GOOD)[:-9]

TABLE: dict[str, Bad] = {
    # -- JSON --
    "broken JSON": Bad("x.jsonl", lines("{'a': 1}"), 2, ["not JSON", "column 2", "mend it"]),
    "two objects a line": Bad("x.jsonl", lines('{"a": 1}{"b": 2}'), 2, ["Extra data", "mend it"]),
    "a key twice": Bad(
        "x.jsonl", lines('{"text": "a", "text": "b"}'), 2, ["the key 'text'", "mend or remove it"]
    ),
    "last line cut off": Bad("x.jsonl", CUT, 3, ["not JSON", "it may be cut off"]),
    "Latin-1": Bad(
        "x.jsonl", lines() + b'{"prompt": "\xe9"}\n', 2, ["not UTF-8 (byte 12)", "save the file"]
    ),
    "UTF-16": Bad("x.jsonl", lines().decode().encode("utf-16"), None, ["UTF-16", "iconv"]),
    "raw NUL bytes": Bad("x.jsonl", lines("\0\0\0"), 2, ["not JSON", "mend it"]),
    "a number of 5,000 digits": Bad(
        "x.jsonl", lines('{"a": ' + "1" * 5000 + "}"), 2, ["not JSON", "mend or remove it"]
    ),
    "a nesting without end": Bad("x.jsonl", lines("[" * 10**5), 2, ["not JSON", "mend"]),
    "a list as a row": Bad("x.jsonl", lines('["q", "a"]'), 2, ["expected a mapping", "remove"]),
    "a word as a row": Bad("x.jsonl", lines("null"), 2, ["got None", "Mend or remove the row"]),
    "a list in .jsonl": Bad(
        "x.jsonl", b'[{"a": 1}]', None, ["begins with a list", "name a file that", "rows .json"]
    ),
    "rows in .json": Bad("x.json", lines(GOOD), None, ["line 2", "name a file", ".jsonl"]),
    "no list in .json": Bad("x.json", b'{"a": 1}', None, ["expected a list", "write [ROW, ROW]"]),
    "a row of 10 MB": Bad(
        "x.jsonl",
        lambda: lines({"prompt": "q" * MAX_ROW_BYTES, "response": "a"}, GOOD),
        2,
        ["longer than 10,000,000 bytes", "split it"],
    ),
    "a long row in .json": Bad(
        "x.json",
        lambda: json.dumps([GOOD, {"prompt": "q" * MAX_ROW_BYTES, "response": "a"}]).encode(),
        2,
        ["longer than 10,000,000 characters", "split it"],
    ),
    # -- CSV and TSV --
    "a cell too many": Bad(
        "x.csv", b"prompt,response\nq,a\nq,a,b\n", 2, ["(3, not 2)", "quote the"]
    ),
    "a cell too few": Bad("x.csv", b"prompt,response\nq,a\nq\n", 2, ["(1, not 2)", "quote the"]),
    "a column twice": Bad("x.csv", b"text,text\na,b\n", None, ["'text' twice", "rename one"]),
    "an open quote": Bad(
        "x.csv", b'prompt,response\nq,a\nq,"a\nq,a\n', 2, ["not CSV", "close each quote"]
    ),
    "a quote in a cell": Bad(
        "x.csv", b'prompt,response\nq,"a" he said\n', 1, ["not CSV", "double the quotes"]
    ),
    "semicolons": Bad("x.csv", b"prompt;response\nq;a\n", None, ["by ';'", "save it with commas"]),
    "tabs in .csv": Bad(
        "x.csv", b"prompt\tresponse\nq\ta\n", None, ["tabs", "end its name in .tsv"]
    ),
    "Latin-1 in .csv": Bad(
        "x.csv", b"prompt,response\nq,a\nq,\xe9\n", 2, ["not UTF-8", "save the"]
    ),
    "a head alone": Bad("x.csv", b"prompt,response\n", None, ["holds no rows", "leave it out"]),
    "a cell too many in .tsv": Bad(
        "x.tsv", b"prompt\tresponse\nq\ta\tb\n", 1, ["differs", "quote the cells", "a tab"]
    ),
    # -- columns --
    "a column missing": Bad("x.jsonl", lines(prompt="q"), 2, ["no 'response' field", "columns:"]),
    "a null": Bad("x.jsonl", lines(prompt="q", response=None), 2, ["'response' is null", "rename"]),
    "a whole number": Bad("x.jsonl", lines(prompt="q", response=5), 2, ["int 5", "in quotes"]),
    "a number": Bad("x.jsonl", lines(prompt=1.5, response="a"), 2, ["float 1.5", "in quotes"]),
    "a truth value": Bad(
        "x.jsonl", lines(prompt="q", response=True), 2, ["bool True", "the word that is meant"]
    ),
    "a list": Bad(
        "x.jsonl", lines(prompt="q", response=["a"]), 2, ["list ['a']", "Join its items"]
    ),
    "a mapping": Bad("x.jsonl", lines(prompt="q", response={"text": "a"}), 2, ["dict", "the part"]),
    "messages where text belongs": Bad(
        "x.jsonl",
        lines(prompt=[said("user")], response="a"),
        2,
        ["list", "columns: {messages: OLD}"],
    ),
    "an empty answer": Bad("x.jsonl", lines(prompt="q", response=" \n"), 2, ["empty", "remove"]),
    "half a surrogate pair": Bad(
        "x.jsonl", lines('{"prompt": "q", "response": "\\ud83d"}'), 2, ["surrogate", "Remove that"]
    ),
    "a NUL character": Bad(
        "x.jsonl",
        lines(prompt="q\0", response="a"),
        2,
        ["NUL character (character 2)", "Remove it"],
    ),
    "unknown columns": Bad("x.jsonl", b'{"q": 1, "a": 2}\n', 1, ["no format fits", "rename them"]),
    "a rename of no column": Bad(
        "x.jsonl",
        lines(),
        None,
        ["no row has a column 'reply'", "found"],
        {"columns": {"a": "reply"}},
    ),
    # -- turns --
    "roles out of order": Bad(
        "x.jsonl", turns(said("user"), said("user")), 2, ["ends with a question", "remove the row"]
    ),
    "two answers on end": Bad(
        "x.jsonl",
        turns(said("user"), said("assistant"), said("assistant")),
        2,
        ["message 3 is from 'assistant', expected 'user'", "Mend or remove"],
    ),
    "two system turns": Bad(
        "x.jsonl",
        turns(said("system"), said("system"), said("user"), said("assistant")),
        2,
        ["message 2 is from 'system', which only the first may be", "remove the row"],
    ),
    "a tool": Bad(
        "x.jsonl",
        turns(said("user"), said("tool"), said("assistant")),
        2,
        ["'messages' item 2 is from 'tool'", "Leave conversations with calls of tools out"],
    ),
    "a call of a tool": Bad(
        "x.jsonl",
        turns(said("user"), said("assistant", None, tool_calls=[{"id": 1}])),
        2,
        ["item 2", "calls a tool", "Leave conversations with calls of tools out"],
    ),
    "a stranger": Bad("x.jsonl", turns(said("narrator")), 2, ["from 'narrator'", "Rename the"]),
    "nobody speaks": Bad(
        "x.jsonl", turns({"content": "x"}), 2, ["item 1 has no 'role'", "who speaks"]
    ),
    "no messages": Bad("x.jsonl", turns(), 2, ["no messages", "Mend or remove the row"]),
    "parts of a message": Bad(
        "x.jsonl",
        turns(said("user", [{"type": "text"}])),
        2,
        ["item 1: 'content' holds list", "join"],
    ),
    "a weight below 0": Bad(
        "x.jsonl",
        turns(said("user"), said("assistant", weight=-1)),
        2,
        ["item 2: 'weight' holds -1", "0 or more"],
    ),
    "weight and train": Bad(
        "x.jsonl",
        turns(said("user"), said("assistant", weight=1, train=True)),
        2,
        ["both 'weight' and 'train'", "Keep one"],
    ),
    "train in quotes": Bad(
        "x.jsonl", turns(said("user"), said("assistant", train="no")), 2, ["'no'", "without quotes"]
    ),
    "nothing to learn": Bad(
        "x.jsonl",
        turns(said("user"), said("assistant", train=False)),
        2,
        ["every answer has weight 0", "remove the row"],
    ),
    "a list as text": Bad(
        "x.csv", b'messages\n"[{""role"": ""user""}]"\n', 1, ["written as text", "JSON lines"]
    ),
    "no marker": Bad(
        "x.jsonl",
        b'{"text": "hello"}\n',
        1,
        ["does not begin with '<human>:'"],
        {"format": "chip2"},
    ),
    # -- packed files --
    "gzip that ends early": Bad(
        "x.jsonl.gz", gzip.compress(lines(GOOD))[:-12], None, ["damaged or cut off", "again"]
    ),
    "no gzip": Bad("x.jsonl.gz", lines(), None, ["damaged or cut off (Not a gzipped", "again"]),
    "gzip without .gz": Bad(
        "x.jsonl", gzip.compress(lines()), None, ["gzip", "end its name in .gz"]
    ),
    "bzip2 that ends early": Bad(
        "x.jsonl.bz2",
        bz2.compress(lines())[:-8],
        None,
        ["damaged or cut off", "make the file again"],
    ),
    "xz that is damaged": Bad(
        "x.jsonl.xz", lzma.compress(lines())[:-20] + bytes(20), None, ["damaged", "again"]
    ),
    "zstd that ends early": Bad(
        "x.jsonl.zst", zstd(lines())[:-4], None, ["damaged or cut off (Truncated", "again"]
    ),
    "a gzip bomb": Bad("x.jsonl.gz", lambda: gzip.compress(BOMB), None, ["unpacks to", "yourself"]),
    "a zip bomb": Bad(
        "x.zip",
        lambda: zipped(("rows.json", BOMB)),
        None,
        ["unpacks to more than 67,108,864 bytes", "unpack it yourself"],
    ),
    "two files in a zip": Bad(
        "x.zip", zipped(("a.csv", b""), ("b.csv", b"")), None, ["holds 2 files", "unpack it"]
    ),
    "no data in a zip": Bad("x.zip", zipped(("a.exe", b"")), None, ["'a.exe'", "none of .json"]),
    "no zip": Bad("x.zip", b"hello", None, ["not a .zip file", "fetch it again"]),
    "a locked zip": Bad("x.zip", locked, None, ["locked with a password", "unpack it first"]),
    "Parquet in gzip": Bad("x.parquet.gz", b"", None, ["compressed twice", "unpack it"]),
    # -- something else --
    "an empty file": Bad("x.jsonl", b"", None, ["holds no rows", "leave it out, or fill it"]),
    "empty lines": Bad("x.jsonl", b"\n \n", None, ["holds no rows", "leave it out, or fill it"]),
    "an empty text": Bad("x.txt", b" \n\n", None, ["holds no rows", "leave it out, or fill it"]),
    "a web page": Bad("x.csv", b"<!DOCTYPE html><html>", None, ["a web page", "download the file"]),
    "a pointer of Git LFS": Bad(
        "x.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        None,
        ["pointer of Git LFS", "git lfs pull"],
    ),
    "a spreadsheet": Bad("x.csv", zipped(("a.xml", b"")), None, ["spreadsheet", "save it as CSV"]),
    "Parquet in .jsonl": Bad(
        "x.jsonl", b"PAR1\x15\x04", None, ["Parquet", "end its name in .parquet"]
    ),
    "an unknown kind": Bad("x.doc", b"hello", None, ["none of .json", ".gz"]),
    "damaged Parquet": Bad(
        "x.parquet", parquet(pa.table({"text": ["a"]}))[:-10], None, ["not Parquet", "again"]
    ),
    "bytes in Parquet": Bad(
        "x.parquet",
        parquet(pa.table({"text": [b"a"]})),
        1,
        ["bytes b'a'", "Store the column as text"],
    ),
    "a null in Parquet": Bad(
        "x.parquet", parquet(pa.table({"text": ["a", None]})), 2, ["'text' is null", "columns:"]
    ),
    "a column twice in Parquet": Bad(
        "x.parquet",
        parquet(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])),
        None,
        ["column 'text' twice", "rename one"],
    ),
    "damaged Arrow": Bad(
        "x.arrow", arrow([GOOD])[:-200], None, ["not Arrow", "make the file again"]
    ),
    "Latin-1 text": Bad("x.txt", b"caf\xe9", 1, ["not UTF-8 (byte 3)", "save the file as UTF-8"]),
    "a text of 10 MB": Bad(
        "x.txt",
        lambda: b"word\n" * (MAX_ROW_BYTES // 5 + 1),
        1,
        ["longer than 10,000,000 bytes", "documents: paragraph or line"],
    ),
}


def write(what: str, folder: Path) -> tuple[Bad, Path]:
    bad = TABLE[what]
    (folder / bad.name).write_bytes(bad.data if isinstance(bad.data, bytes) else bad.data())
    return bad, folder / bad.name


@pytest.mark.parametrize("what", TABLE)
def test_bad_input_is_one_sentence_with_file_row_and_remedy(what: str, tmp_path: Path):
    bad, path = write(what, tmp_path)
    with pytest.raises(QLoRAError) as caught:
        list(read_conversations(RowSources.parse({"path": str(path), **bad.settings})))
    sentence = str(caught.value)
    assert str(path) in sentence
    assert (f"{path}, row {bad.row}: " in sentence) == (bad.row is not None)
    positions = [sentence.find(word) for word in bad.words]
    assert -1 not in positions, sentence
    assert positions == sorted(positions), sentence
    assert len(sentence.replace(str(path), "")) < 900, "that is no sentence"
    assert sentence.endswith(".")
    assert "\n" not in sentence


SKIPPABLE = [
    *("broken JSON", "two objects a line", "last line cut off", "Latin-1", "raw NUL bytes"),
    *("a nesting without end", "a list as a row", "a word as a row", "a row of 10 MB"),
    *("a long row in .json", "a cell too many", "a cell too few", "a column missing", "a null"),
    *("a whole number", "an empty answer", "half a surrogate pair", "roles out of order"),
    *("two system turns", "a tool", "a weight below 0", "a null in Parquet"),
]


@pytest.mark.parametrize("what", SKIPPABLE)
def test_a_bad_row_is_left_out_and_the_others_are_read(what: str, tmp_path: Path):
    bad, path = write(what, tmp_path)
    report = ReadingReport()
    rows = list(read_conversations(RowSources.parse(str(path)), "skip", report))
    assert rows
    assert bad.row not in [place.row for place, _ in rows]
    assert report.num_skipped == {str(path): 1}
    (skipped,) = report.skipped
    assert (skipped.place.source, skipped.place.row) == (str(path), bad.row)
    assert bad.words[0] in skipped.reason


@pytest.mark.parametrize(
    "what", ["an open quote", "gzip that ends early", "a gzip bomb", "a web page", "UTF-16"]
)
def test_a_file_whose_next_row_cannot_be_found_is_never_skipped(what: str, tmp_path: Path):
    bad, path = write(what, tmp_path)
    with pytest.raises(DatasetFormatError, match=bad.words[0]):
        list(read_conversations(RowSources.parse(str(path)), "skip"))


def test_an_address_is_not_fetched():
    for address in ("https://example.org/rows.jsonl", "http://x/y", "s3://bucket/rows.parquet"):
        with pytest.raises(ConfigurationError) as caught:
            list(read_conversations(RowSources.parse(address)))
        assert f"'{address}' is an address; download it first" in str(caught.value)
