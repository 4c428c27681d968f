"""Encoded rows that are kept: damage, killed processes, full disks, and the memory it takes."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import warm
from generated_rows import generated
from prepared_rows import (
    CHILD,
    child,
    content,
    entries,
    many_rows,
    prepare,
    same,
    turns,
    write,
)
from toy_tokenizers import build

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows import preparation
from qlora_pl.data.rows.audit import Limits
from qlora_pl.data.rows.preparation import prepare_split
from qlora_pl.data.rows.row_store import FILES, META
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import TEMPORARY_PREFIX


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return many_rows(tmp_path)


@pytest.mark.parametrize("name", [*FILES, META])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, name: str, how: str):
    path = write(tmp_path / "rows.jsonl", [turns(row) for row in generated(63, 5)])
    fresh = prepare(path)
    prepare(path, tmp_path / "cache")
    (folder,) = entries(tmp_path / "cache")
    before = content(folder)
    data = bytearray(before[name])
    if how == "missing":
        (folder / name).unlink()
    else:
        data[len(data) // 2] ^= 4
        (folder / name).write_bytes(data if how == "flipped" else data[:-1])
    assert same(fresh, prepare(path, tmp_path / "cache"))
    assert content(folder) == before
    assert entries(tmp_path / "cache") == [folder]


def test_what_a_killed_process_leaves_is_not_used(tmp_path: Path, source: Path):
    """Killed while it writes, at the first sign of its folder."""
    build("bytes").save_pretrained(tmp_path / "tokenizer")
    endless = f"""
import qlora_pl.data.rows.preparation as preparation
def wait(self, *_):
    for file in self._files.values():
        file.flush()
    print("half-way", flush=True)
    import time
    time.sleep(60)
preparation.RowWriter.finish = wait
{CHILD}"""
    cache = tmp_path / "cache"
    arguments = [str(source), str(tmp_path / "tokenizer"), str(cache)]
    (tmp_path / "endless.py").write_text(endless)
    with warm.Started(tmp_path / "endless.py", *arguments) as process:
        assert process.stdout.readline() == "half-way\n"
    (leftover,) = entries(cache)
    assert leftover.name.startswith(TEMPORARY_PREFIX)
    assert (leftover / "tokens.int32").stat().st_size > 0
    split = prepare(source, cache, max_length=512)
    assert same(split, prepare(source, max_length=512))
    assert len(entries(cache)) == 2  # it may be another process's, still at work
    yesterday = time.time() - 100_000
    os.utime(leftover, (yesterday, yesterday))
    prepare(source, cache)
    assert leftover not in entries(cache)


@pytest.mark.slow
def test_processes_that_write_the_same_entry_at_once_all_get_it(tmp_path: Path, source: Path):
    build("bytes").save_pretrained(tmp_path / "tokenizer")
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda _: child(tmp_path, source)[:2], range(2)))
    assert made[0] == made[1]
    (folder,) = entries(tmp_path / "cache")
    assert not folder.name.startswith(TEMPORARY_PREFIX)


def test_an_entry_that_appears_while_the_same_is_written_does_no_harm(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    """And one that is cleared away as damaged by a third, right after."""
    cache = tmp_path / "cache"
    write_rows = preparation.write_rows

    def slow(folder: Path, *arguments: Any) -> None:
        write_rows(folder, *arguments)
        monkeypatch.setattr(preparation, "write_rows", write_rows)
        prepare(source, cache)

    monkeypatch.setattr(preparation, "write_rows", slow)
    assert same(prepare(source, cache), prepare(source))
    assert len(entries(cache)) == 1


def test_a_cache_that_cannot_be_written_is_done_without_after_one_warning(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
):
    """A file in its place, which root cannot write to either."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data").write_text("")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert same(prepare(source, tmp_path / "cache"), prepare(source))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(tmp_path / "cache" / "data") in warning
    assert "QLORA_PL_CACHE" in warning


@pytest.mark.parametrize("keeps", [True, False], ids=["cache", "no cache"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, source: Path, keeps: bool):
    """The kernel refuses the byte after the limit, as a full disk would; no test double."""
    cache = tmp_path / "cache"
    if keeps:
        cache.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(TrainingStoppedError) as caught:
            prepare(source, cache if keeps else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert "\n" not in str(caught.value)
    if keeps:
        assert entries(cache) == []
        assert same(prepare(source, cache), prepare(source))


def test_rows_that_cannot_be_read_back_are_one_sentence() -> None:
    with pytest.raises(TrainingStoppedError, match=r"cannot be read back .*check the disk"):
        preparation._unkept(lambda folder: None)


def test_rows_in_memory_are_kept_nowhere(tmp_path: Path):
    tokenizer = build("bytes")
    encoder = Encoder(load_template("guanaco", tokenizer), tokenizer)
    rows = RowSources.parse([{"prompt": "q", "response": "a"}])
    split = prepare_split(rows, encoder, Limits(), "data.x", tmp_path / "cache")
    assert [c.reference for c in split.conversations] == ["a"]
    assert not (tmp_path / "cache").exists()


# -- size ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path):
    """Peak anonymous memory of a child: 20,000 rows against ten times as many, within 12 MiB.

    Kept for each row is nothing; the tolerance is for what the allocator keeps back.
    """
    build("bytes").save_pretrained(tmp_path / "tokenizer")
    peaks = []
    for number in (20_000, 200_000):
        path = tmp_path / f"{number}.jsonl"
        with path.open("w") as file:
            for n in range(number):
                row = {"prompt": f"How many legs has animal {n}?", "response": f"It has {n} legs."}
                file.write(json.dumps(row) + "\n")
        count, _, peak = child(tmp_path, path, keep=False)
        assert int(count) == number
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 12 * 1024
