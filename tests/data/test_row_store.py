"""Encoded rows on disk: what comes back is what went in, and damage is noticed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from generated_rows import encoder, generated

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import EncodedExample
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.data.rows.row_store import (
    FILES,
    META,
    WEIGHTS,
    EncodedChunk,
    RowWriter,
    StoredRows,
    digest_of,
    from_plain,
    open_rows,
    to_plain,
)


def examples(number: int = 12) -> tuple[list[Conversation], list[EncodedExample]]:
    rows = generated(seed=51, number=number)
    return rows, [example for (example,) in encoder("bytes", "guanaco").encode(rows)]


def weighted(example: EncodedExample, weight: float) -> EncodedExample:
    return example._replace(weights=example.is_trained * np.float32(weight))


def store(
    folder: Path, rows: list[Conversation], made: list[EncodedExample], sizes: list[int]
) -> StoredRows:
    """Written in chunks of these sizes."""
    folder.mkdir(exist_ok=True)
    with RowWriter(folder) as writer:
        done = 0
        for size in sizes:
            some = slice(done, done + size)
            origins = [(0, n + 1, 0, n - done) for n in range(*some.indices(len(rows)))]
            writer.append(EncodedChunk.of(made[some], origins, rows[some]))
            done += size
        writer.finish([("a file", 0)], {"num_rows": done}, np.arange(5))
    stored = open_rows(folder)
    assert stored is not None
    return stored


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7], [0, 12], [12, 0], [3, 0, 9]])
def test_rows_come_back_as_they_went_in_whatever_the_chunks(tmp_path: Path, sizes: list[int]):
    rows, made = examples()
    stored = store(tmp_path / "rows", rows, made, sizes)
    assert len(stored.rows) == len(stored.places) == len(stored.conversations) == 12
    for place, (row, example) in enumerate(zip(rows, made, strict=True)):
        ids, labels = stored.rows[place]
        assert ids.tolist() == example.input_ids.tolist()
        assert labels.tolist() == example.labels.tolist()
        assert stored.conversations[place] == row
        assert str(stored.places[place]) == f"a file, row {place + 1}"
    assert stored.rows.fingerprint() == EncodedRows.from_examples(made).fingerprint()
    assert stored.needed.tolist() == [0, 1, 2, 3, 4]
    assert stored.report == {"num_rows": 12}


def test_no_rows_at_all_come_back_as_none(tmp_path: Path):
    stored = store(tmp_path / "rows", [], [], [])
    assert len(stored.rows) == len(stored.conversations) == 0


@pytest.mark.parametrize("first", range(0, 12, 3))
def test_weights_that_appear_late_count_from_where_they_do(tmp_path: Path, first: int):
    """The same bytes as if they had been known from the beginning: 1 where trained before that."""
    rows, made = examples()
    made[first] = weighted(made[first], 0.5)
    late = store(tmp_path / "late", rows, made, [1] * 12)
    at_once = store(tmp_path / "at once", rows, made, [12])
    in_memory = EncodedRows.from_examples(made)
    for place, example in enumerate(made):
        counted = example.is_trained * (0.5 if place == first else 1.0)
        for kept in (late.rows, at_once.rows, in_memory):
            weights = kept.weights(place)
            assert weights is not None
            assert weights.tolist() == counted.tolist()
    prints = {kept.fingerprint() for kept in (late.rows, at_once.rows, in_memory)}
    assert len(prints) == 1
    assert files(tmp_path / "late") == files(tmp_path / "at once")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_rows_without_weights_take_no_room_for_them(tmp_path: Path):
    assert store(tmp_path / "rows", *examples(), [12]).rows.token_weights is None
    assert WEIGHTS not in files(tmp_path / "rows")


NAMES = [*FILES, META, WEIGHTS]
DAMAGE = list(itertools.product(NAMES, ["missing", "cut", "longer"]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path, name: str, where: str):
    rows, made = examples()
    made[0] = weighted(made[0], 0.5)
    store(tmp_path / "rows", rows, made, [12])
    path = tmp_path / "rows" / name
    data = bytearray(path.read_bytes())
    place = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[where]
    for bit in (0, 5):
        data[place] ^= 1 << bit
        path.write_bytes(data)
        assert open_rows(tmp_path / "rows") is None
        data[place] ^= 1 << bit
    path.write_bytes(data)
    assert open_rows(tmp_path / "rows") is not None


def test_every_changed_character_of_the_description_is_noticed(tmp_path: Path):
    """It holds the counts that decide whether a run may start, so a changed digit matters."""
    store(tmp_path / "rows", *examples(), [12])
    path = tmp_path / "rows" / META
    text = path.read_text()
    for place in range(0, len(text), 3):
        other = "7" if text[place] != "7" else "8"
        path.write_text(text[:place] + other + text[place + 1 :])
        assert open_rows(tmp_path / "rows") is None


@pytest.mark.parametrize(("name", "how"), DAMAGE)
def test_a_file_that_is_missing_cut_or_longer_is_noticed(tmp_path: Path, name: str, how: str):
    rows, made = examples()
    made[0] = weighted(made[0], 0.5)
    store(tmp_path / "rows", rows, made, [12])
    path = tmp_path / "rows" / name
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "cut" else data + b"\0")
    assert open_rows(tmp_path / "rows") is None


def test_what_was_not_finished_is_no_rows(tmp_path: Path):
    rows, made = examples()
    with RowWriter(tmp_path) as writer:
        writer.append(EncodedChunk.of(made, [(0, n, 0, n) for n in range(12)], rows))
    assert open_rows(tmp_path) is None
    assert open_rows(tmp_path / "nothing there") is None


def test_a_conversation_passes_through_json_unchanged():
    odd = Conversation(
        (
            Message("system", ""),
            Message("user", '\u2028 😀 \\ "', context="\0"),
            Message("assistant", "a", weight=0.25),
        )
    )
    for row in [odd, Conversation.from_text("t"), *generated(seed=52, number=20)]:
        assert from_plain(json.loads(json.dumps(to_plain(row)))) == row


def test_selections_keep_rows_places_and_conversations_together(tmp_path: Path):
    """Two rows of one conversation, as a split or unrolled one has."""
    rows, made = examples()
    with RowWriter(tmp_path) as writer:
        origins = [(0, n // 2 + 1, n % 2 + 1, n // 2) for n in range(12)]
        writer.append(EncodedChunk.of(made, origins, rows[:6]))
        writer.finish([("f", 0)], {}, np.zeros(0))
    stored = open_rows(tmp_path)
    assert stored is not None
    chosen = np.array([7, 0, 7, 11])
    places, conversations = stored.places.select(chosen), stored.conversations.select(chosen)
    assert [(p.row, p.part) for p in places] == [(4, 2), (1, 1), (4, 2), (6, 2)]
    assert list(conversations) == [rows[3], rows[0], rows[3], rows[5]]
    assert list(conversations.each()) == [rows[3], rows[0], rows[5]]
    assert list(stored.conversations.each()) == rows[:6]
    assert list(conversations[1:3]) == [rows[0], rows[3]]
    assert [(p.row, p.part) for p in places[2:]] == [(4, 2), (6, 2)]


def test_no_two_lists_of_parts_have_the_same_digest():
    lists = [[], [""], ["", ""], ["a"], ["ab"], ["a", "b"], ["", "ab"], ["ab", ""], [b"\0"]]
    assert len({digest_of(parts) for parts in lists}) == len(lists)
    assert digest_of(["a"]) == digest_of([b"a"])
