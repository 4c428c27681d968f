"""From files, Hub names and Python objects to raw rows, and sentences about those that are not."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_tokenizers import TEXTS

from qlora_pl.data.reading.readers import hub_splits, read_rows
from qlora_pl.data.reading.sources import NO_ROWS, RowSources, SourceConfig
from qlora_pl.errors import ConfigurationError, DatasetFormatError

ROWS = [{"prompt": text, "response": text[::-1]} for text in TEXTS]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    return path


def read(path: Path | str, **settings: Any) -> list[Mapping[str, Any]]:
    source = SourceConfig(path=str(path), **settings)
    return [row for _, _, row in read_rows(RowSources((source,)))]


def sentence(path: Path, **settings: Any) -> str:
    with pytest.raises(DatasetFormatError) as caught:
        read(path, **settings)
    return str(caught.value).replace(str(path), "FILE")


# -- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".JSONL"])
def test_a_file_gives_its_rows_in_order_and_unchanged(tmp_path: Path, suffix: str):
    path = write(tmp_path / f"rows{suffix.lower()}", ROWS).rename(tmp_path / f"rows{suffix}")
    assert read(path) == ROWS


def test_no_value_changes_its_type_on_the_way(tmp_path: Path):
    """What ``datasets`` and pandas would make dates, numbers and missing values of."""
    row = {"date": "2024-01-01", "number": "007", "null": None, "true": True, "nested": [{"a": 1}]}
    assert read(write(tmp_path / "rows.jsonl", [row, row])) == [row, row]
    texts = {"date": "2024-01-01", "number": "007", "missing": "", "na": "NA", "float": "1e5"}
    assert read(write(tmp_path / "rows.csv", [texts])) == [texts]
    assert read(write(tmp_path / "rows.parquet", [{"messages": [{"role": "user"}]}])) == [
        {"messages": [{"role": "user"}]}
    ]


def test_json_with_one_list_inside_is_that_list(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": "1.0", "data": ROWS}))
    assert read(path) == ROWS


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path):
    for suffix in (".json", ".jsonl", ".csv"):
        path = write(tmp_path / f"rows{suffix}", ROWS[:2])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read(path) == ROWS[:2]


def test_a_long_cell_is_read_whole(tmp_path: Path):
    """Python's csv stops at 131,072 characters unless it is told otherwise."""
    row = {"text": "word " * 100_000}
    assert read(write(tmp_path / "rows.csv", [row])) == [row]


def test_sources_are_read_one_after_the_other_with_their_places(tmp_path: Path):
    first = write(tmp_path / "a.jsonl", ROWS[:2])
    first.write_text(first.read_text().replace("\n", "\n\n", 1))  # an empty line in the middle
    second = write(tmp_path / "b.csv", ROWS[2:4])
    found = list(read_rows(RowSources.parse([str(first), {"path": str(second), "limit": 1}])))
    assert [str(place) for place, _, _ in found] == [
        f"{first}, row 1",
        f"{first}, row 3",  # as an editor counts
        f"{second}, row 1",
    ]
    assert [row for _, _, row in found] == ROWS[:3]


def test_a_limit_reads_no_further(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", ROWS[:3])
    path.write_text(path.read_text() + "not JSON\n")
    assert read(path, limit=3) == ROWS[:3]


# -- renaming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_a_renamed_column_replaces_one_that_had_its_name(tmp_path: Path, turned: bool):
    """Whatever the order of the columns: a rename that lost to the old column would go unseen."""
    row = {"prompt": "q", "response": "worse", "better": "a"}
    row = dict(reversed(row.items())) if turned else row
    path = write(tmp_path / "rows.jsonl", [row])
    assert read(path, columns={"response": "better"}) == [{"prompt": "q", "response": "a"}]


def test_two_columns_may_swap_and_one_may_serve_twice(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "q"}])
    assert read(path, columns={"prompt": "response", "response": "prompt"}) == [
        {"prompt": "q", "response": "a"}
    ]
    assert read(path, columns={"input": "prompt", "output": "prompt"}) == [
        {"response": "q", "input": "a", "output": "a"}
    ]


def test_renaming_a_column_that_some_rows_lack_leaves_those_rows(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q"}, {"prompt": "q", "context": "c"}])
    assert read(path, columns={"input": "context"}) == [
        {"prompt": "q"},
        {"prompt": "q", "input": "c"},
    ]


def test_renaming_a_column_that_no_row_has_is_refused(tmp_path: Path):
    """``{input: contex}`` would otherwise train without a context and without a word."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert sentence(path, columns={"input": "contex", "output": "response"}) == (
        "FILE: no row has a column 'contex', which columns renames to 'input'; found 'prompt', "
        "'response'."
    )


# -- files that are not what their suffix says ---------------------------------------------------


def test_a_bad_line_of_jsonl_is_named_by_its_number(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    for line, expected in (
        (
            "{'prompt': 1}",
            "FILE, row 3: not JSON (Expecting property name enclosed in double quotes",
        ),
        ('["a list"]', "FILE, row 3: expected a mapping of columns, got ['a list']. Mend"),
        ("null", "FILE, row 3: expected a mapping of columns, got None. Mend"),
        ('{"a": 1}{"b": 2}', "FILE, row 3: not JSON (Extra data, column 9)"),
        ("[" * 100_000, "FILE, row 3: not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "FILE, row 3: not JSON"),
    ):
        path.write_text(f'{{"a": 1}}\n\n{line}\n{{"a": 2}}\n')
        assert sentence(path).startswith(expected)
    path.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    assert sentence(path) == "FILE, row 2: not UTF-8 (byte 7); save the file as UTF-8."


def test_bad_json_is_named_by_its_line(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n{"a": 2}\n{"a": 3}]')
    assert sentence(path) == "FILE: not JSON (Expecting ',' delimiter, line 3, column 1); mend it."
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert sentence(path) == (
        "FILE: not JSON (Extra data, line 2, column 1); name a file with one row a line .jsonl."
    )
    path.write_text('{"a": 1}')
    assert sentence(path) == (
        "FILE: expected a list of rows, got dict; write [ROW, ROW], or one row a line in a .jsonl "
        "file."
    )
    path.write_text('[{"a": 1}, "b"]')
    assert sentence(path) == (
        "FILE, row 2: expected a mapping of columns, got 'b'. Mend or remove the row."
    )


def test_a_bad_row_of_csv_is_named(tmp_path: Path):
    path = tmp_path / "rows.csv"
    for text, expected in (
        ("a,b\n1,2\n1,2,3\n", "FILE, row 2: its number of cells differs from the header's"),
        ("a,b\n1,2\n1\n", "FILE, row 2: its number of cells differs from the header's"),
        ("a,a\n1,2\n", "FILE: its header has the column 'a' twice"),
        # An open quote would swallow every row up to the end of the file.
        ('a,b\n1,2\n1,"open\n1,2\n1,2\n', "FILE, row 2: not CSV (unexpected end of data)"),
        ('a,b\n1,2\n1,"two" words\n', "FILE, row 2: not CSV (',' expected after '\"')"),
    ):
        path.write_text(text)
        assert sentence(path).startswith(expected)
    path.write_bytes(b"a,b\n1,\xe9\n")
    assert sentence(path) == "FILE, row 1: not UTF-8 (byte 2); save the file as UTF-8."


def test_a_damaged_parquet_file_is_named(tmp_path: Path):
    path = write(tmp_path / "rows.parquet", ROWS)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[: len(whole) // 2], whole[:4] + bytes(200) + whole[204:]):
        path.write_bytes(damaged)
        assert sentence(path).startswith("FILE: not Parquet (")


def test_an_empty_file_is_named_even_beside_a_full_one(tmp_path: Path):
    full = SourceConfig(path=str(write(tmp_path / "full.jsonl", ROWS)))
    for name, text in (("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.csv", "a,b\n"), ("d.json", "[]")):
        (tmp_path / name).write_text(text)
        empty = SourceConfig(path=str(tmp_path / name), columns={"input": "context"})
        with pytest.raises(DatasetFormatError) as caught:
            list(read_rows(RowSources((full, empty))))
        assert (
            str(caught.value) == f"{tmp_path / name}: it holds no rows; leave it out, or fill it."
        )


def test_a_list_of_rows_under_the_wrong_name_is_told_the_right_one(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS, indent=1))
    assert sentence(path) == (
        "FILE: it begins with a list; name a file that is one list of rows .json."
    )


# -- what a user may write as sources ------------------------------------------------------------


def test_sources_are_a_name_a_mapping_or_a_list_of_them():
    one = SourceConfig(path="a.jsonl")
    two = SourceConfig(path="b.csv", format="alpaca", limit=3, columns={"output": "response"})
    mapping = {"path": "b.csv", "format": "alpaca", "limit": 3, "columns": {"output": "response"}}
    trees = SourceConfig(
        dataset="oasst1", sample=9, sample_seed=1, weight=0.5, languages=("en", "de"), replies="all"
    )
    for value, sources in (
        ("a.jsonl", (one,)),
        (Path("a.jsonl"), (one,)),
        (one, (one,)),
        (mapping, (two,)),
        (["a.jsonl", mapping], (one, two)),
        ((Path("a.jsonl"), two), (one, two)),
        (
            "[a.jsonl, {path: b.csv, format: alpaca, limit: 3, columns: {output: response}}]",
            (one, two),
        ),
        ("{path: a.jsonl}", (one,)),
        ({"path": Path("a.jsonl")}, (one,)),
        (
            "{dataset: oasst1, sample: 9, sample_seed: 1, weight: 0.5, languages: [en, de], "
            "replies: all}",
            (trees,),
        ),
        ({"dataset": "alpaca"}, (SourceConfig(dataset="alpaca"),)),
    ):
        parsed = RowSources.parse(value)
        assert parsed.sources == sources
        assert RowSources.parse(parsed) is parsed
        assert RowSources.parse(parsed.plain()).sources == sources
    assert RowSources.parse(None) is NO_ROWS
    assert not NO_ROWS
    assert NO_ROWS.plain() is None


def test_rows_in_memory_are_taken_as_they_are():
    from_list = datasets.Dataset.from_list
    for rows in (ROWS, tuple(ROWS), from_list(ROWS), from_list([{"path": "x"} | r for r in ROWS])):
        parsed = RowSources.parse(rows)
        assert parsed
        assert parsed.sources == ()
        assert parsed.problems() == []
        found = list(read_rows(parsed))
        assert [{k: row[k] for k in ("prompt", "response")} for _, _, row in found] == ROWS
        assert str(found[1][0]) == "rows in memory, row 2"
        assert parsed.plain() == f"({len(ROWS)} rows in memory)"


def test_something_else_among_rows_in_memory_is_named():
    with pytest.raises(DatasetFormatError, match=r"^rows in memory, row 2: expected a mapping"):
        list(read_rows(RowSources.parse([ROWS[0], "prompt"])))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (3, "data.x: expected a file, a Hub name or a list, got 3."),
        ([], "data.x: the list is empty; name at least one file."),
        ("[]", "data.x: the list is empty; name at least one file."),
        ([3], "data.x: expected a file or a mapping with 'path', got 3."),
        ([None], "data.x: expected a file or a mapping with 'path', got None."),
        ("[a.jsonl", "data.x: '[a.jsonl' is not a list that YAML reads"),
        (
            {"path": "a.jsonl", "fromat": "alpaca"},
            "data.x: a source has no setting 'fromat' (known: path, dataset, split, subset, "
            "revision, file, format, columns, limit, sample, sample_seed, weight, languages, "
            "streaming, replies, documents); did you mean 'format'?",
        ),
        ([{"path": 3}], "data.x: {'path': 3} has no path; write path: FILE."),
        ({"path": "a", "limit": 0}, "data.x (a): limit must be at least 1, got 0."),
        ({"path": "a", "limit": "3"}, "data.x (a): limit must be a whole number, got '3'."),
        ({"path": "a", "limit": 0.5}, "data.x (a): limit must be a whole number, got 0.5."),
        ({"path": "a", "limit": True}, "data.x (a): limit must be a whole number, got True."),
        ({"path": "a", "split": None}, "data.x (a): split must be text, got None."),
        ({"path": "a", "subset": 3}, "data.x (a): subset must be text, got 3."),
        ({"path": "a", "revision": 1.0}, "data.x (a): revision must be text, got 1.0."),
        ({"path": "a", "format": 3}, "data.x (a): format must be text, got 3."),
        ({"path": "a", "sample": 0}, "data.x (a): sample must be at least 1, got 0."),
        ({"path": "a", "sample": 1.5}, "data.x (a): sample must be a whole number, got 1.5."),
        ({"path": "a", "sample_seed": -1}, "data.x (a): sample_seed must be at least 0, got -1."),
        ({"path": "a", "sample_seed": None}, "data.x (a): sample_seed must be a whole number"),
        (
            {"path": "a", "limit": 3, "sample": 3},
            "data.x (a): limit takes the first rows and sample draws rows; remove one of the two.",
        ),
        ({"path": "a", "weight": 0}, "data.x (a): weight must be a number above 0, got 0."),
        ({"path": "a", "weight": -1.0}, "data.x (a): weight must be a number above 0, got -1.0."),
        ({"path": "a", "weight": True}, "data.x (a): weight must be a number above 0, got True."),
        ("{path: a, weight: .nan}", "data.x (a): weight must be a number above 0, got nan."),
        ("{path: a, weight: .inf}", "data.x (a): weight must be a number above 0, got inf."),
        ({"path": "a", "weight": "2"}, "data.x (a): weight must be a number above 0, got '2'."),
        ({"path": "a", "languages": "en"}, "data.x (a): languages must be a list of codes such"),
        ({"path": "a", "languages": [1]}, "data.x (a): languages must be a list of codes such"),
        ({"path": "a", "languages": 1}, "data.x (a): languages must be a list of codes such"),
        ({"path": "a", "replies": "top"}, "data.x (a): replies must be one of best, all, got"),
        (
            {"path": "a", "documents": "page"},
            "data.x (a): documents must be one of file, paragraph, line, got 'page'.",
        ),
        ({"path": 3, "dataset": "text"}, "data.x (3): path must be text, got 3."),
        (
            {"path": "a", "columns": "output"},
            "data.x (a): columns must be {NEW: OLD}, got 'output'.",
        ),
        (
            {"path": "a", "columns": {"output": None}},
            "data.x (a): columns must be {NEW: OLD}, got {'output': None}.",
        ),
        (
            {"path": "a", "format": "alpacca"},
            "data.x (a): no format is called 'alpacca'; did you mean 'alpaca'?",
        ),
        (
            datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
            "data.x: expected a file, a Hub name or a list, got IterableDataset",
        ),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
            "data.x: a DatasetDict holds several splits; name one of 'train'.",
        ),
    ],
    ids=str,
)
def test_sources_that_cannot_be_meant_are_one_sentence(value: Any, sentence: str):
    with pytest.raises(ConfigurationError) as caught:
        RowSources.parse(value, "data.x")
    assert str(caught.value).startswith(sentence)


def test_rows_are_only_taken_from_python():
    with pytest.raises(ConfigurationError, match="has no setting 'prompt'"):
        RowSources.parse([ROWS[0]], "data.sources", allow_rows=False)


def test_what_cannot_be_read_is_found_without_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "alpaca.jsonl", ROWS)
    (tmp_path / "notes.doc").write_text("x")
    (tmp_path / "folder").mkdir()
    for path, problem in (
        ("alpaca.jsonl", None),
        ("alpca.jsonl", "data.x: no file 'alpca.jsonl'; did you mean 'alpaca.jsonl'?"),
        ("no/such/file.jsonl", "data.x: no file 'no/such/file.jsonl'."),
        ("./nothing", "data.x: no file './nothing'."),
        ("folder", "data.x: 'folder' holds no data file (.json, "),
        ("notes.doc", "data.x: 'notes.doc' is none of .json, "),
        ("alpaca", "data.x: a dataset that is known by name is written {dataset: alpaca}."),
        ("*.csv", "data.x: no file matches '*.csv'; check the pattern."),
        ("https://example.org/a.jsonl", "data.x: 'https://example.org/a.jsonl' is an address; "),
        ("", "data.x: the path is empty; name a file."),
        ("tatsu-lab/alpaca", None),
        ("imdb", None),
    ):
        found = RowSources.parse(path).problems("data.x")
        assert len(found) == (problem is not None)
        assert all(sentence.startswith(str(problem)) for sentence in found)


@pytest.mark.parametrize(
    ("setting", "value"), [("split", "test"), ("subset", "en"), ("revision", "main")]
)
def test_a_setting_of_hub_datasets_is_refused_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: str
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    assert RowSources.parse({"path": "rows.jsonl", setting: value}).problems("data.x") == [
        f"data.x: {setting} '{value}' is for datasets of the Hub, 'rows.jsonl' is a file and has "
        "none; remove it, or name the file that holds those rows."
    ]
    assert RowSources.parse({"path": "rows.jsonl", "split": "train"}).problems() == []
    assert RowSources.parse({"path": "owner/name", setting: value}).problems() == []


# -- the Hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """One dataset with a split of every kind; notes what was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load(path: str, subset: Any, split: str, revision: Any) -> datasets.Dataset:
        asked.append((path, subset, split, revision))
        if path != "someone/rows":
            raise ValueError("no such dataset\nwith a second line")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_hub_dataset_is_asked_for_as_written(hub: list[tuple[Any, ...]]):
    rows = read("someone/rows", subset="small", split="train_sft", revision="abc", limit=3)
    assert rows == ROWS[:3]
    assert hub == [("someone/rows", "small", "train_sft", "abc")]


def test_a_hub_dataset_that_cannot_be_loaded_is_one_sentence(hub: list[tuple[Any, ...]]):
    with pytest.raises(DatasetFormatError) as caught:
        read("someone/else")
    assert str(caught.value) == (
        "data.sources: dataset 'someone/else' (split 'train') could not be loaded (no such "
        "dataset); check its name and the network, or download it and name its path."
    )


def test_another_split_is_read_whole():
    """What was drawn of the training rows says nothing about the others."""
    train = SourceConfig(path="a/b", sample=5, weight=2.0, columns={"text": "x"})
    assert train.of_split("test") == SourceConfig(path="a/b", split="test", columns={"text": "x"})
    assert SourceConfig(path="a/b", limit=5).of_split("x") == SourceConfig(path="a/b", split="x")


def test_a_file_has_no_splits(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert hub_splits(SourceConfig(path=str(path))) == []
