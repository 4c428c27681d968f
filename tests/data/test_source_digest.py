"""The number of a source changes with every byte of its rows, and with nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from qlora_pl.data.reading.source_digest import source_digest
from qlora_pl.data.reading.sources import SourceConfig
from qlora_pl.errors import ConfigurationError

LINE = '{"text": "a"}\n'


def digest(path: Path | str, **settings: Any) -> str:
    return source_digest(SourceConfig(path=str(path), **settings))


def test_a_copy_elsewhere_and_settings_change_nothing(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/b.jsonl").write_text(LINE)
    first = digest(tmp_path / "a.jsonl")
    assert len(first) == 64
    assert first == digest(tmp_path / "deeper/b.jsonl")
    assert first == digest(tmp_path / "a.jsonl", format="text", sample=1, weight=2.0)
    assert first == digest(tmp_path / "a.jsonl", dataset="text")


def test_every_byte_the_suffix_and_the_order_count(tmp_path: Path):
    seen = set()
    for name, text in (
        ("a.jsonl", LINE),
        ("b.jsonl", LINE.replace("a", "b")),
        ("c.txt", LINE),
        ("d.jsonl", LINE + "\n"),
        ("e.jsonl", ""),
    ):
        (tmp_path / name).write_text(text)
        seen.add(digest(tmp_path / name))
    assert len(seen) == 5


def test_a_folder_has_the_bytes_of_its_files_in_their_order(tmp_path: Path):
    names = ("a.jsonl", "b.jsonl")
    for name, text in zip(names, ("1\n2\n", "3\n"), strict=True):
        (tmp_path / name).write_text(text)
    first = digest(tmp_path)
    assert first == digest(f"{tmp_path}/*.jsonl")
    (tmp_path / "README.md").write_text("no data")
    assert first == digest(tmp_path)
    for name, text in zip(names, ("1\n", "2\n3\n"), strict=True):  # the same bytes, cut elsewhere
        (tmp_path / name).write_text(text)
    assert first != digest(tmp_path)
    for name, text in zip(names, ("3\n", "1\n2\n"), strict=True):
        (tmp_path / name).write_text(text)
    assert first != digest(tmp_path)


def test_a_saved_dataset_counts_its_split_and_not_what_datasets_remembers(tmp_path: Path):
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    first = digest(tmp_path / "saved")
    assert first != digest(tmp_path / "saved", split="test")
    (tmp_path / "saved/train/cache-0.arrow").write_text("what map() leaves")
    assert first == digest(tmp_path / "saved")
    (next((tmp_path / "saved/train").glob("data-*.arrow"))).write_bytes(b"other")
    assert first != digest(tmp_path / "saved")


def test_a_hub_dataset_counts_its_name_its_settings_and_its_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
):
    """The loader stands for the network; the fingerprint is the library's own."""
    texts = ["a"]

    def load(path: str, *_: Any, **__: Any) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"text": text} for text in texts])

    monkeypatch.setattr(datasets, "load_dataset", load)
    first = digest("someone/rows")
    assert first == digest("someone/rows", limit=1)
    changed = ({"subset": "x"}, {"split": "test"}, {"revision": "main"}, {"file": "a.jsonl"})
    assert len({first, *(digest("someone/rows", **settings) for settings in changed)}) == 5
    assert first != digest("someone/else")
    texts.append("b")
    assert first != digest("someone/rows")


def test_what_cannot_be_read_has_no_number(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="no file"):
        digest(tmp_path / "nothing.jsonl")
