"""Message trees -> conversations, by the rules that ``oasst_trees`` states, worked out by hand."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest

from qlora_pl.data.reading.oasst_trees import TreeRules, conversations_of_trees
from qlora_pl.data.reading.places import BadRow, Place
from qlora_pl.errors import DatasetFormatError

LONG_AGO = 5000
"""Levels of a tree that is deeper than Python's stack."""


def message(id: str, parent: str | None, text: str, **more: Any) -> dict[str, Any]:
    """A row of the flat table; who speaks follows from the text's first letter, q or a."""
    role = {"q": "prompter", "a": "assistant"}[text[0]]
    row = {"message_id": id, "parent_id": parent, "role": role, "text": text, "lang": "en"}
    return row | {"deleted": False, "review_result": True, "review_count": 3, "rank": None} | more


FOREST = [
    # three levels; ranks 0 and 1 at both replies, and a question at the end
    message("t1", None, "q one"),
    message("t1a", "t1", "a worse", rank=1),
    message("t1b", "t1", "a better", rank=0),
    message("t1ba", "t1b", "q more", rank=1),
    message("t1bb", "t1b", "q other", rank=0),
    message("t1bba", "t1bb", "a last", rank=None),
    message("t1bbaa", "t1bba", "q unanswered"),
    # a tie, and one without a rank: the first id of those ranked
    message("t2", None, "q two"),
    message("t2c", "t2", "a no rank, though its id is last", rank=None),
    message("t2b", "t2", "a tied second", rank=2),
    message("t2a", "t2", "a tied first", rank=2),
    # no ranks at all: the first id
    message("t3", None, "q three"),
    message("t3b", "t3", "a b"),
    message("t3a", "t3", "a a"),
    # the best reply was deleted, with what stands below it; the next one is taken
    message("t4", None, "q four"),
    message("t4a", "t4", "a deleted", rank=0, deleted=True),
    message("t4aa", "t4a", "q below"),
    message("t4aaa", "t4aa", "a below"),
    message("t4b", "t4", "a next", rank=1),
    # review
    message("t5", None, "q five"),
    message("t5a", "t5", "a rejected", rank=0, review_result=False),
    message("t5b", "t5", "a nobody looked", rank=1, review_result=None, review_count=0),
    message("t5c", "t5", "a undecided but looked at", rank=2, review_result=None, review_count=1),
    # another language, and one message in another language within an English tree
    message("t6", None, "q sechs", lang="de"),
    message("t6a", "t6", "a sechs", lang="de"),
    message("t7", None, "q seven"),
    message("t7a", "t7", "a sieben", lang="de", rank=0),
    message("t7b", "t7", "a seven", rank=1),
    # no answer; an unfinished tree; a message whose parent is not there
    message("t8", None, "q eight"),
    message("t9", None, "q nine", tree_state="growing"),
    message("t9a", "t9", "a nine", tree_state="growing"),
    message("ta", "gone", "a orphan"),
    message("taa", "ta", "q below the orphan"),
]

ENGLISH = [
    ["q one", "a better", "q other", "a last"],
    ["q two", "a tied first"],
    ["q three", "a a"],
    ["q four", "a next"],
    ["q five", "a undecided but looked at"],
    ["q seven", "a seven"],
]
LEFT_OUT = {
    "another reply was preferred": 2 + 2 + 1,  # t1a and t1ba, t2b and t2c, t3b
    "a question without an answer": 1,
    "a prompt without an answer": 1,
    "deleted": 1,
    "below a message that is left out": 2 + 1,  # below t4a, and below the orphan
    "rejected in review": 1,
    "not reviewed": 1,
    "another language": 3,
    "the tree is not ready_for_export": 2,
    "its parent is missing": 1,
}


def build(rows: list[Any], **rules: Any) -> tuple[list[list[str]], Counter[str], list[Place]]:
    left_out: Counter[str] = Counter()
    placed = [(Place("oasst.jsonl", number), row) for number, row in enumerate(rows, start=1)]
    texts, places = [], []
    for place, row in conversations_of_trees(placed, TreeRules(**rules), left_out):
        assert not isinstance(row, BadRow), row
        assert [turn["role"] for turn in row["messages"]] == [
            {"q": "user", "a": "assistant"}[turn["content"][0]] for turn in row["messages"]
        ]
        texts.append([turn["content"] for turn in row["messages"]])
        places.append(place)
    return texts, left_out, places


def test_the_best_path_of_each_tree_is_what_the_rules_say():
    texts, left_out, places = build(FOREST, languages=("en",))
    assert texts == ENGLISH
    assert left_out == LEFT_OUT
    assert len(FOREST) == sum(map(len, ENGLISH)) + sum(LEFT_OUT.values())  # each is somewhere
    assert [FOREST[place.row - 1]["text"] for place in places] == [text[0] for text in ENGLISH]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_in_the_file_changes_nothing(seed: int):
    shuffled = random.Random(seed).sample(FOREST, len(FOREST))
    texts, left_out, places = build(shuffled, languages=("en",))
    assert (texts, left_out) == (ENGLISH, LEFT_OUT)
    assert [shuffled[place.row - 1]["text"] for place in places] == [text[0] for text in ENGLISH]


def test_without_languages_every_language_is_kept():
    texts, left_out, _ = build(FOREST)
    assert [text for text in texts if text not in ENGLISH] == [
        ["q sechs", "a sechs"],
        ["q seven", "a sieben"],  # which was ranked first
    ]
    assert "another language" not in left_out


def test_all_paths_are_one_for_each_last_answer():
    texts, left_out, _ = build(FOREST, languages=("en",), replies="all")
    assert texts[:2] == [["q one", "a better", "q other", "a last"], ["q one", "a better"]]
    assert texts[2] == ["q one", "a worse"]
    last = [text[-1] for text in texts]
    assert len(last) == len(set(last)) == 11
    # q more and q unanswered are cut away, of which the first leaves a path of its own
    assert left_out["a question without an answer"] == 2
    assert "another reply was preferred" not in left_out


def nested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same forest as one row a tree."""

    def grow(row: dict[str, Any]) -> dict[str, Any]:
        children = [grow(child) for child in rows if child["parent_id"] == row["message_id"]]
        return {**row, "replies": children}

    return [
        {
            "message_tree_id": row["message_id"],
            "tree_state": row.get("tree_state", "ready_for_export"),
            "prompt": grow(row),
        }
        for row in rows
        if row["parent_id"] is None
    ]


@pytest.mark.parametrize("replies", ["best", "all"])
def test_nested_trees_give_what_the_flat_table_gives(replies: str):
    without_orphans = FOREST[:-2]  # which no tree can hold
    flat = build(without_orphans, languages=("en",), replies=replies)
    tree = build(nested(without_orphans), languages=("en",), replies=replies)
    assert tree[:2] == flat[:2]
    assert [place.row for place in build(nested(without_orphans))[2]] == [1, 2, 3, 4, 5, 6, 7]


def test_a_tree_may_be_deeper_than_pythons_stack():
    rows = [
        message(f"{n:05}", None if n == 0 else f"{n - 1:05}", f"{'qa'[n % 2]} {n}")
        for n in range(LONG_AGO)
    ]
    (path,), left_out, _ = build(rows[::-1])
    assert len(path) == LONG_AGO
    assert not left_out
    tree: dict[str, Any] = {}
    for row in reversed(rows):
        tree = {**row, "replies": [tree] if tree else []}
    assert build([{"prompt": tree}])[0] == [path]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [message("a", "b", "q"), message("b", "a", "a"), message("c", None, "q")],
            "oasst.jsonl, row 1: message 'a' is its own ancestor (or hangs below one that is); "
            "mend its parent_id.",
        ),
        ([message("a", "a", "q")], "oasst.jsonl, row 1: message 'a' is its own ancestor"),
        (
            [message("a", None, "q"), message("a", None, "q")],
            "oasst.jsonl, row 2: message 'a' stands there for the second time (first in "
            "oasst.jsonl, row 1); name each file once, and remove one of the two.",
        ),
    ],
)
def test_a_table_that_is_no_forest_is_one_sentence(rows: list[Any], sentence: str):
    with pytest.raises(DatasetFormatError) as caught:
        build(rows)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (message("a", None, "q") | {"text": None}, "'text' is null; found 'message_id', 'role'"),
        (message("a", None, "q") | {"role": "moderator"}, "'role' is 'moderator'; known: prompter"),
        (message("a", None, "q") | {"rank": "first"}, "'rank' holds 'first'. Write a number"),
        (message("a", None, "q") | {"message_id": None}, "'message_id' is null"),
        (
            {"prompt": message("a", None, "q") | {"replies": "none"}},
            "'replies' holds str, expected",
        ),
        ({"prompt": message("a", None, "q") | {"replies": ["x"]}}, "a message is str, expected"),
    ],
)
def test_a_row_that_is_no_message_is_bad_and_the_others_are_read(row: Any, reason: str):
    good = [message("b", None, "q b"), message("c", "b", "a c")]
    for order in itertools.permutations([row, *good]):
        placed = [(Place("x", number), item) for number, item in enumerate(order, start=1)]
        found = list(conversations_of_trees(placed, TreeRules(), Counter()))
        (bad,) = [item for _, item in found if isinstance(item, BadRow)]
        assert bad.reason.startswith(reason)
        assert sum(not isinstance(item, BadRow) for _, item in found) == 1


def test_a_deleted_message_may_have_lost_its_text():
    rows = [message("a", None, "q"), message("b", "a", "a"), message("c", "a", "a", deleted=True)]
    rows[2]["text"] = None
    assert build(rows)[0] == [["q", "a"]]


def test_a_bad_row_among_messages_is_handed_on():
    bad = BadRow("not JSON.")
    assert list(conversations_of_trees([(Place("x", 1), bad)], TreeRules(), Counter())) == [
        (Place("x", 1), bad)
    ]
