"""Files of every kind give the same rows, with their numbers, and are not held whole."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest
from row_file_kinds import KINDS, ROWS, as_jsonl, as_parquet, as_table

from qlora_pl.data.reading.normalizing import ReadingReport, read_conversations
from qlora_pl.data.reading.readers import hub_splits, read_rows
from qlora_pl.data.reading.sources import RowSources, SourceConfig
from qlora_pl.errors import ConfigurationError, DatasetFormatError


def read(path: Path | str, **settings: Any) -> list[Any]:
    source = SourceConfig(path=str(path), **settings)
    return [row for _, _, row in read_rows(RowSources((source,)))]


def places(path: Path | str) -> list[str]:
    return [str(place) for place, _, _ in read_rows(RowSources.parse(str(path)))]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_rows_unchanged(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(KINDS[name](ROWS))
    assert read(path) == ROWS
    assert places(path) == [f"{path}, row {number}" for number in range(1, len(ROWS) + 1)]


@pytest.mark.parametrize("name", [name for name in KINDS if "json" not in name or "l" in name])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path, name: str):
    """All kinds but the list of a .json file; a mebibyte is what buffers may take."""

    def peak(count: int) -> int:
        path = tmp_path / name
        path.write_bytes(
            KINDS[name]([{"prompt": "q" * 50, "response": str(n)} for n in range(count)])
        )
        rows = read_rows(RowSources.parse(str(path)))
        next(rows)  # what is imported on the way is no row
        tracemalloc.start()
        assert sum(1 for _ in rows) == count - 1
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(20_000) < peak(2_000) + 2**20  # 20,000 rows as dictionaries are 9 MB


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_no_data(tmp_path: Path):
    for name in ("rows.jsonl", "rows.csv", "rows.tsv"):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + KINDS[name](ROWS[:2]).replace(b"\n", b"\r\n"))
        assert read(path) == ROWS[:2]
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(path) == [{"text": "one\ntwo\n"}]


def test_empty_lines_of_a_table_are_passed_over(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('\n\nprompt,response\n\n"q\n\nr",a\n\nq,a\n\n')
    assert [row["prompt"] for row in read(path)] == ["q\n\nr", "q"]
    assert places(path) == [f"{path}, row 1", f"{path}, row 2"]


@pytest.mark.parametrize(
    ("documents", "rows"),
    [
        ("file", [(1, "\n one\ntwo\n\n \n\nthree\nfour")]),
        ("paragraph", [(2, " one\ntwo"), (7, "three\nfour")]),
        ("line", [(2, " one"), (3, "two"), (7, "three"), (8, "four")]),
    ],
)
def test_a_text_is_cut_into_the_documents_that_are_named(
    tmp_path: Path, documents: str, rows: list[tuple[int, str]]
):
    path = tmp_path / "rows.txt"
    path.write_text("\n one\ntwo\n\n \n\nthree\nfour")
    source = RowSources.parse({"path": str(path), "documents": documents})
    assert [(place.row, row["text"]) for place, _, row in read_rows(source)] == rows


# -- several files ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three data files of three kinds, and what lies beside data."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "b.csv").write_bytes(as_table(ROWS[2:4]))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(as_jsonl(ROWS[:2])))
    (folder / "c.parquet").write_bytes(as_parquet(ROWS[4:6]))
    for name in ("README.md", "README.txt", "LICENSE.txt", ".hidden.jsonl", "_meta.json", "x.py"):
        (folder / name).write_text("no data")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "deeper").mkdir()
    (folder / "deeper/d.jsonl").write_bytes(as_jsonl(ROWS[6:8]))
    return folder


def test_a_folder_is_its_data_files_in_the_order_of_their_names(folder: Path):
    assert read(folder) == ROWS[:6]
    assert places(folder) == [
        f"{folder / name}, row {number}"
        for name in ("a.jsonl.gz", "b.csv", "c.parquet")
        for number in (1, 2)
    ]


def test_a_pattern_is_the_files_that_it_matches(folder: Path):
    assert read(f"{folder}/[bc].*") == ROWS[2:6]
    assert read(f"{folder}/**/*.jsonl*") == ROWS[:2] + ROWS[6:8]
    assert places(f"{folder}/deep*/*") == [f"{folder}/deeper/d.jsonl, row {n}" for n in (1, 2)]


def test_a_limit_and_a_format_go_over_the_files_of_a_folder(folder: Path):
    assert read(folder, limit=3) == ROWS[:3]
    (folder / "d.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    report = ReadingReport()
    found = list(read_conversations(RowSources.parse(str(folder)), report=report))
    assert len(found) == 7
    assert report.formats == {str(folder): "prompt-response (guessed); alpaca (guessed)"}
    assert report.num_rows == {str(folder): 7}


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path):
    path = tmp_path / "rows[1].jsonl"
    path.write_bytes(as_jsonl(ROWS[:1]))
    assert read(path) == ROWS[:1]


@pytest.mark.parametrize("other", ["test", "validation", "dev", "val"])
def test_a_folder_with_the_files_of_two_splits_is_refused(tmp_path: Path, other: str):
    """Training on both would go unseen."""
    (tmp_path / "train-0.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "train-1.jsonl").write_bytes(as_jsonl(ROWS))
    assert len(read(tmp_path)) == 2 * len(ROWS)
    (tmp_path / f"{other}.jsonl").write_bytes(as_jsonl(ROWS))
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path)
    sentence = str(caught.value)
    assert "holds the splits '" in sentence
    assert f"'{other}.jsonl'" in sentence
    assert f"'{tmp_path / '*train*'}'" in sentence
    assert len(read(tmp_path / "*train*")) == 2 * len(ROWS)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("empty", "holds no data file (.json, .jsonl, .ndjson, .csv, .tsv, .parquet"),
        (".", "name one of its folders (empty)"),
        ("*.csv", "no file matches '*.csv'; check the pattern."),
        ("*", "'notes.doc' is none of .json"),
    ],
)
def test_a_folder_or_pattern_without_data_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.doc").write_text("x")
    (sentence,) = RowSources.parse(path).problems("data.x")
    assert sentence.startswith("data.x: ")
    assert words in sentence


# -- what datasets saved ---------------------------------------------------------------------------


def test_a_dataset_that_was_saved_is_read_with_its_splits(tmp_path: Path):
    parts = {"train": ROWS[:3], "validation": ROWS[3:5]}
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    )
    splits.save_to_disk(tmp_path / "splits")
    splits["train"].save_to_disk(tmp_path / "one")
    assert read(tmp_path / "splits") == ROWS[:3]
    assert read(tmp_path / "splits", split="validation") == ROWS[3:5]
    assert read(tmp_path / "one") == ROWS[:3]
    assert places(tmp_path / "one")[0] == f"{tmp_path / 'one'}, row 1"
    assert hub_splits(SourceConfig(path=str(tmp_path / "splits"))) == ["train", "validation"]
    assert hub_splits(SourceConfig(path=str(tmp_path / "one"))) == []


def test_a_split_that_was_not_saved_is_one_sentence(tmp_path: Path):
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"a": one, "b": one}).save_to_disk(tmp_path / "splits")
    one.save_to_disk(tmp_path / "one")
    for path, settings, words in (
        ("splits", {}, "it has no split 'train'; set split to one of 'a', 'b'."),
        ("one", {"split": "test"}, "it holds one dataset and no split 'test'; remove split."),
    ):
        with pytest.raises(DatasetFormatError) as caught:
            read(tmp_path / path, **settings)
        assert str(caught.value) == f"{tmp_path / path}: {words}"
    (tmp_path / "one/state.json").write_text("{}")
    with pytest.raises(DatasetFormatError, match="no folder that datasets can load"):
        read(tmp_path / "one")
