"""A draw of so many rows: uniform, in order, nested, and the same wherever it is made."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from itertools import combinations
from pathlib import Path

import pytest

from qlora_pl.data.reading.normalizing import read_conversations
from qlora_pl.data.reading.sampling import sample_rows
from qlora_pl.data.reading.sources import RowSources


@pytest.mark.parametrize("seed", [0, 1, 2**64 + 3])
def test_the_rows_with_the_smallest_keys_are_drawn_in_their_order(seed: int):
    """Against a sort of all keys."""

    def key(position: int) -> int:
        digest = blake2b(
            position.to_bytes(8, "little"), digest_size=8, key=seed.to_bytes(16, "little")
        )
        return int.from_bytes(digest.digest(), "little")

    expected = sorted(sorted(range(1000), key=key)[:50])
    assert list(sample_rows(range(1000), 50, seed)) == expected


def test_the_draw_is_the_same_on_every_machine():
    """Written down once: neither Python's hash seed nor a library's generator has a part in it."""
    assert list(sample_rows(range(100), 5, 0)) == DRAWN
    assert list(sample_rows(range(100), 5, 1)) != DRAWN


DRAWN = [13, 18, 25, 66, 85]


def test_a_smaller_draw_is_part_of_a_larger_one():
    larger = set(sample_rows(range(300), 100, 7))
    assert set(sample_rows(range(300), 30, 7)) < larger
    assert len(larger) == 100


def test_more_rows_than_there_are_is_all_of_them():
    assert list(sample_rows("abc", 5, 0)) == ["a", "b", "c"]
    assert list(sample_rows([], 5, 0)) == []


def test_every_subset_is_as_likely_as_any_other():
    """6 pairs of 4 rows over 6,000 seeds: chi squared with 5 degrees of freedom.

    Below 20.5 in 99.9 % of the cases where it is so, and the seeds are fixed.
    """
    counts = Counter(tuple(sample_rows(range(4), 2, seed)) for seed in range(6000))
    assert set(counts) == set(combinations(range(4), 2))
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5


def test_a_source_gives_its_sample_with_the_places_of_its_rows(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "row {n}"}}\n' for n in range(1, 101)))
    sources = RowSources.parse({"path": str(path), "sample": 5, "sample_seed": 0})
    found = list(read_conversations(sources))
    assert [place.row for place, _ in found] == [n + 1 for n in DRAWN]
    assert [row.reference for _, row in found] == [f"row {n + 1}" for n in DRAWN]


def test_a_sample_of_more_rows_than_a_source_has_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    assert len(list(read_conversations(RowSources.parse({"path": str(path), "sample": 2})))) == 1
    assert f"{path}: sample 2, but it has 1 rows" in caplog.messages
