"""MinHash against brute force: every pair compared, with Jaccard's index written out once more."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from qlora_pl.inspection.data.duplicates import SIMILAR, alike, same, similarity


def runs(text: str) -> frozenset[str]:
    """Three words in a row, all that a text has."""
    words = text.split()
    return frozenset(" ".join(words[start : start + 3]) for start in range(len(words) - 2))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """By the definition."""
    both = one | other
    return len(one & other) / len(both) if both else 0.0


def texts_with_copies(seed: int) -> list[str]:
    """Two hundred texts and, of each, a copy with a few of its words changed."""
    drawn = random.Random(seed)
    texts = []
    for _ in range(200):
        words = [f"w{drawn.randrange(5000)}" for _ in range(drawn.randint(1, 60))]
        copy = list(words)
        for _ in range(drawn.randint(0, 4)):
            copy[drawn.randrange(len(copy))] = f"x{drawn.randrange(5000)}"
        texts += [" ".join(words), " ".join(copy)]
    drawn.shuffle(texts)
    return texts


def grouped_by_brute_force(texts: list[str]) -> set[frozenset[int]]:
    """Chains of pairs that are equal or similar."""
    group = {row: {row} for row in range(len(texts))}
    shingles = [runs(text) for text in texts]
    for a, b in combinations(range(len(texts)), 2):
        if texts[a] == texts[b] or jaccard(shingles[a], shingles[b]) >= SIMILAR:
            joined = group[a] | group[b]
            group.update(dict.fromkeys(joined, joined))
    return {frozenset(rows) for rows in group.values() if len(rows) > 1}


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_those_of_comparing_every_pair(seed: int) -> None:
    """A group that is found is always one; of those that are there, one in 50 may be missed."""
    texts = texts_with_copies(seed)
    expected = grouped_by_brute_force(texts)
    found = {frozenset(group.members) for group in alike(texts)}
    assert len(expected) > 50
    assert found <= expected
    assert len(expected - found) <= len(expected) / 50


def test_the_same_texts_give_the_same_groups() -> None:
    texts = texts_with_copies(7)
    assert alike(texts) == alike(list(texts))


@pytest.mark.parametrize(
    ("one", "other", "index"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "a b c e", 1 / 3),
        ("a b c", "a b d", 0.0),
        ("a", "a", 1.0),
        ("a", "b", 0.0),
        ("", "a b c", 0.0),
    ],
)
def test_similarity_is_jaccards_index(one: str, other: str, index: float) -> None:
    assert similarity(one, other) == index


def test_short_texts_are_alike_only_if_they_are_equal() -> None:
    texts = ["yes", "no", "yes", "yes it is", "", "no it"]
    assert [group.members for group in alike(texts)] == [[0, 2]]


@pytest.mark.parametrize("texts", [[], [""], ["one"], ["a b c"]])
def test_there_may_be_next_to_nothing(texts: list[str]) -> None:
    assert alike(texts) == []


def test_groups_of_equal_keys_keep_the_order_of_their_rows() -> None:
    assert [group.members for group in same("abcab")] == [[0, 3], [1, 4]]


def test_many_copies_are_one_group() -> None:
    text = " ".join(f"w{number}" for number in range(30))
    texts = [f"{text} {number}" for number in range(300)]
    assert [len(group.members) for group in alike(texts)] == [300]
