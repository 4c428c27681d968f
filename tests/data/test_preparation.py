"""From sources to encoded rows: the same in any number of processes, kept, and never stale."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generated_rows import generated
from prepared_rows import PACKAGE, child, content, entries, many_rows, prepare, same, turns, write
from toy_tokenizers import build

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.encoding.encoder import TOKENIZER_CHUNK
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows import encode_stream, preparation
from qlora_pl.data.rows.audit import DataReport
from qlora_pl.errors import ConfigurationError, DatasetFormatError, QLoRAError, TrainingStoppedError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return many_rows(tmp_path)


# -- the same rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlong", ["cut", "cut_keep_stop", "cut_prompt", "split", "drop"])
def test_rows_are_the_same_from_the_cache_and_without_it(
    tmp_path: Path, source: Path, overlong: str, monkeypatch: pytest.MonkeyPatch
):
    without = prepare(source, overlong=overlong)
    assert same(without, prepare(source, tmp_path / "cache", overlong=overlong))

    def fail(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(preparation, "write_rows", fail)
    assert same(without, prepare(source, tmp_path / "cache", overlong=overlong))


def test_rows_are_the_same_bytes_in_one_process_and_in_two(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    """A number of processes that was asked for is started at once; more chunks than wait."""
    monkeypatch.setattr(encode_stream, "TOKENIZER_CHUNK", 100)
    there: list[int] = []
    submit = encode_stream.ProcessPoolExecutor.submit

    def counted(*arguments: Any) -> Any:
        there.append(1)
        return submit(*arguments)

    monkeypatch.setattr(encode_stream.ProcessPoolExecutor, "submit", counted)
    one = prepare(source, tmp_path / "one")
    assert not there
    two = prepare(source, tmp_path / "two", processes=2)
    assert len(there) == -(-len(source.read_text().splitlines()) // 100)
    assert same(one, two)
    assert content(entries(tmp_path / "one")[0]) == content(entries(tmp_path / "two")[0])


def test_a_bad_row_is_named_by_whichever_process_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"prompt": "q", "response": "a"}] * 3 * TOKENIZER_CHUNK
    rows[2 * TOKENIZER_CHUNK + 4] = {"prompt": "q", "response": "a" * 99}
    path = write(tmp_path / "rows.jsonl", rows)
    for processes in (1, 2):
        with pytest.raises(DatasetFormatError, match=f"row {2 * TOKENIZER_CHUNK + 5}: .* tokens"):
            prepare(path, tmp_path / "cache", processes, overlong="error", max_length=50)
        assert entries(tmp_path / "cache") == []


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_in_one_sentence(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    """As the kernel kills where memory ends."""
    monkeypatch.setattr(encode_stream, "_encode_there", die)
    with pytest.raises(TrainingStoppedError, match=r"data\.encoding_processes: 1"):
        prepare(source, tmp_path / "cache", processes=2)
    assert entries(tmp_path / "cache") == []


# -- another entry for anything that changes them ------------------------------------------------


def other_eos() -> Any:
    tokenizer = build.__wrapped__("bytes")
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


JINJA = {"jinja": "{% for m in messages %}[{{ m.content }}{{ eos_token }}{% endfor %}"}
CHANGES: list[dict[str, Any]] = [
    {},
    {"template": "alpaca"},
    {"template": {"question": "{content}", "answer": "{content}"}},
    {"template": {"question": "{content} ", "answer": "{content}"}},
    {"template": "chat"},
    {"template": JINJA},
    {"template": JINJA, "tokenizer": other_eos()},
    {"tokenizer": build("bytes-bos")},
    {"tokenizer": build("bytes-trimmed")},
    {"tokenizer": other_eos()},
    {"max_length": 201},
    {"overlong": "drop"},
    {"settings": {"train_on": "everything"}},
    {"settings": {"train_on": "last_answer"}},
    {"settings": {"append_eos": False}},
]


def test_whatever_decides_what_rows_become_gives_another_entry(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [turns(row) for row in generated(62, 5)])
    for number, change in enumerate(CHANGES, start=1):
        for _ in range(2):
            prepare(path, tmp_path / "cache", **change)
            assert len(entries(tmp_path / "cache")) == number
    prepare(path, tmp_path / "cache", max_lost_ratio=0.9)  # which is checked each time
    assert len(entries(tmp_path / "cache")) == len(CHANGES)


def test_a_changed_byte_of_a_source_gives_another_entry(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}] * 5)
    prepare(path, tmp_path / "cache")
    changed = path.stat()
    path.write_text(path.read_text().replace('"a"', '"b"', 1))
    os.utime(path, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    split = prepare(path, tmp_path / "cache")
    assert [c.reference for c in split.conversations] == ["b", "a", "a", "a", "a"]
    assert len(entries(tmp_path / "cache")) == 2


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the package."""
    return shutil.copytree(PACKAGE, tmp_path / "copy" / "qlora_pl")


def changes(code: Path) -> Iterator[int]:
    """As it is, with another comment, and so once more; how many entries there are then."""
    yield 1
    with (code / "data/templates/template.py").open("a") as file:
        file.write("\n# changed\n")
    yield 2
    yield 2


def test_changed_code_gives_another_entry(
    tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}] * 5)
    monkeypatch.setattr(preparation, "__file__", str(code / "data/rows/preparation.py"))
    for number in changes(code):
        prepare(path, tmp_path / "cache")
        assert len(entries(tmp_path / "cache")) == number


@pytest.mark.slow
def test_changed_code_that_is_run_gives_another_entry(tmp_path: Path, code: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}] * 5)
    build("bytes").save_pretrained(tmp_path / "tokenizer")
    for number in changes(code):
        child(tmp_path, path, PYTHONPATH=str(code.parent))
        assert len(entries(tmp_path / "cache")) == number


# -- the split -----------------------------------------------------------------------------------


def test_rows_of_one_conversation_are_all_trained_or_all_validated(tmp_path: Path):
    """A template that gives a row for each answer; a row of either kind would know the other."""
    last_apart = (
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if not add_generation_prompt %}</s>{% endif %}"
    )
    build("bytes", last_apart).save_pretrained(tmp_path / "tokenizer")
    row = [("user", "q"), ("assistant", "a")] * 3
    rows = [
        {"messages": [{"role": role, "content": f"{text}{n}"} for role, text in row]}
        for n in range(30)
    ]
    data = InstructionDataModule(
        sources=RowSources.parse(str(write(tmp_path / "rows.jsonl", rows))),
        tokenizer=str(tmp_path / "tokenizer"),
        template="chat",
        val_size=7,
    )
    data.setup("fit")
    names = {
        name: [int(c.messages[0].content[1:]) for c in data.splits[name].conversations]
        for name in ("train", "val")
    }
    assert len(set(names["val"])) == 7
    assert len(names["val"]) == 21
    assert len(names["train"]) == 69
    assert not set(names["train"]) & set(names["val"])


def test_an_error_of_the_split_comes_each_time_from_the_cache_too(tmp_path: Path, source: Path):
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"data\.max_lost_ratio allows 0\.0%"):
            prepare(source, tmp_path / "cache", max_length=40, max_lost_ratio=0.0)
    assert len(entries(tmp_path / "cache")) == 1
    assert issubclass(ConfigurationError, QLoRAError)


def test_reports_of_chunks_add_up(source: Path):
    """Every count of a split against counting its rows."""
    split = prepare(source, max_length=60)
    report = split.report
    assert report.num_rows == len(split.rows)
    assert report.num_tokens == int(split.rows.lengths.sum())
    assert report.num_trained_tokens == int(split.rows.num_trained.sum())
    whole = prepare(source, max_length=10_000).report
    assert report.longest == whole.longest
    assert report.num_trained_tokens + report.num_lost_tokens == whole.num_trained_tokens
    assert report.num_rows + report.num_dropped == whole.num_rows
    assert report.num_spelling_control == whole.num_spelling_control > 0
    added = DataReport()
    for part in (report, whole):
        added.add(part)
    assert added.num_tokens == report.num_tokens + whole.num_tokens
    assert added.longest == whole.longest
    assert np.isclose(added.lost_ratio, added.num_lost_tokens / whole.num_trained_tokens / 2)
