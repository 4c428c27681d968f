"""Whatever stands in a file: it is read, or one sentence says why not; nothing else is raised."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from row_file_kinds import KINDS, ROWS

from qlora_pl.data.reading.cells import RowError
from qlora_pl.data.reading.formats import FORMATS
from qlora_pl.data.reading.normalizing import OnError, read_conversations
from qlora_pl.data.reading.oasst_trees import TreeRules
from qlora_pl.data.reading.places import BadRow, Place
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.errors import DatasetFormatError, QLoRAError

SEEDS = range(25)


def damaged(whole: bytes, seed: int) -> bytes:
    """A file with some bytes changed, cut off, blanked, put in or put in twice; or random bytes."""
    choose = random.Random(seed)
    data, where = bytearray(whole), choose.randrange(len(whole))
    way = choose.choice(["change", "cut", "blank", "insert", "repeat", "noise"])
    if way == "change":
        for _ in range(choose.randint(1, 5)):
            data[choose.randrange(len(data))] = choose.randrange(256)
    elif way == "cut":
        del data[where:]
    elif way == "blank":
        data[where : where + 20] = bytes(20)
    elif way == "insert":
        data[where:where] = choose.randbytes(choose.randint(1, 10))
    elif way == "repeat":
        data[where:where] = data[: choose.randint(1, 200)]
    else:
        data = bytearray(choose.randbytes(choose.randint(0, 300)))
    return bytes(data)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_one_sentence_says_why_not(
    tmp_path: Path, name: str, on_error: OnError
):
    path = tmp_path / name
    whole = KINDS[name](ROWS)
    sentences = []
    for seed in SEEDS:
        path.write_bytes(damaged(whole, seed))
        try:
            list(read_conversations(RowSources.parse(str(path)), on_error))
        except QLoRAError as error:
            sentences.append(str(error))
    assert sentences
    for sentence in sentences:
        assert str(path) in sentence
        assert sentence.endswith(".")
        assert "\n" not in sentence


def anything(choose: random.Random, depth: int = 3) -> Any:
    """A value as JSON or Parquet may hold it."""
    simple = [
        None,
        True,
        0,
        -1.5,
        float("nan"),
        "",
        "x",
        "\0",
        "\ud83d",
        b"x",
        "human",
        "a\nb",
        "assistant",
    ]
    if depth == 0 or choose.random() < 0.4:
        return choose.choice(simple)
    if choose.random() < 0.5:
        return [anything(choose, depth - 1) for _ in range(choose.randint(0, 3))]
    names = [
        "role",
        "con\ntent",
        "content",
        "from",
        "value",
        "weight",
        "train",
        "tool_calls",
        "replies",
        "rank",
    ]
    names += ["message_id", "parent_id", "text", "instances", "output", "instruction_with_input"]
    return {choose.choice(names): anything(choose, depth - 1) for _ in range(choose.randint(0, 4))}


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_a_row_holds_it_is_converted_or_described(name: str):
    choose = random.Random(name)
    format = FORMATS[name]
    columns = sorted(format.columns | (format.other_columns or frozenset()))
    columns += ["input", "context", "reformulations", "rank", "replies"]
    sentences = []
    for _ in range(400):
        row = {column: anything(choose) for column in columns if choose.random() < 0.9}
        rows = [(Place("x", 1), row)]
        try:
            if format.regroup is not None:
                rows = list(format.regroup(rows, TreeRules(), Counter()))  # type: ignore[arg-type]
            for _, found in rows:
                if isinstance(found, BadRow):
                    sentences.append(found.reason)
                else:
                    assert isinstance(format.convert(found).problem(), str | None)
        except RowError as error:
            sentences.append(f"{error}. {error.remedy}.")
        except DatasetFormatError as error:  # of a forest that is none
            sentences.append(str(error))
    assert len(sentences) > 100
    assert all(sentence.endswith(".") for sentence in sentences)
    assert not any("\n" in sentence for sentence in sentences)
