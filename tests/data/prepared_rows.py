"""Rows of a file, prepared in this process or in a child, and what its cache then holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from generated_rows import generated
from toy_tokenizers import build

import qlora_pl
from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding.encoder import TOKENIZER_CHUNK, Encoder
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.preparation import EncodedSplit, prepare_split
from qlora_pl.data.templates.loading import load_template

PACKAGE = Path(qlora_pl.__file__).parent


def turns(conversation: Conversation) -> dict[str, Any]:
    return {
        "messages": [
            {"role": m.role, "content": f"{m.content}{m.context}"} for m in conversation.messages
        ]
    }


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def many_rows(tmp_path: Path) -> Path:
    """More rows than a chunk holds, some of which spell control tokens."""
    rows = [turns(row) for row in generated(61, 40)] * 14
    assert len(rows) > TOKENIZER_CHUNK
    return write(tmp_path / "rows.jsonl", rows)


def prepare(
    source: Path,
    cache: Path | None = None,
    processes: int | None = 1,
    template: Any = "guanaco",
    tokenizer: Any = None,
    settings: dict[str, Any] | None = None,
    **limits: Any,
) -> EncodedSplit:
    tokenizer = tokenizer or build("bytes")
    encoder = Encoder(load_template(template, tokenizer), tokenizer, **(settings or {}))
    limits = {"max_length": 200, "max_lost_ratio": 1.0} | limits
    sources = RowSources.parse(str(source))
    return prepare_split(sources, encoder, Limits(**limits), "data.x", cache, processes)


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "data").iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(one: EncodedSplit, other: EncodedSplit) -> bool:
    return (
        one.rows.fingerprint() == other.rows.fingerprint()
        and list(one.places) == list(other.places)
        and list(one.conversations) == list(other.conversations)
        and one.report == other.report
    )


CHILD = """
import sys
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.rows.preparation import prepare_split
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.templates.loading import load_template
from qlora_pl.data.encoding.tokenizer import load_tokenizer
from pathlib import Path
tokenizer = load_tokenizer(sys.argv[2])
encoder = Encoder(load_template("guanaco", tokenizer), tokenizer)
cache = Path(sys.argv[3]) if len(sys.argv) > 3 else None
def rss():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])
before = rss()
peak = [before]
import qlora_pl.data.rows.row_store as store
append = store.RowWriter.append
def watched(self, chunk):
    append(self, chunk)
    peak[0] = max(peak[0], rss())
store.RowWriter.append = watched
split = prepare_split(RowSources.parse(sys.argv[1]), encoder, Limits(), "data.x", cache)
print(len(split.rows), split.rows.fingerprint(), max(peak[0], rss()) - before)
"""


def child(tmp_path: Path, path: Path, keep: bool = True, **environment: str) -> list[str]:
    arguments = [str(path), str(tmp_path / "tokenizer"), *([str(tmp_path / "cache")] * keep)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        env={"PYTHONPATH": str(PACKAGE.parent)} | os.environ | environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()
