"""What is in the data more than once: within the training rows, and in validation again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from qlora_pl.data.reading.places import Place
from qlora_pl.inspection.data.duplicates import SIMILAR, WORDS, Group

SHOWN = 10
"""Groups, and rows of a group, that are named; the others are counted."""
EXCERPT = 160
"""Characters of a group's first row that are shown."""

DEFINITIONS = {
    "exact": "Exact duplicates have the same turns, character by character.",
    "similar": "Near-duplicates have the same words once compatibility forms (Unicode's NFKC), "
    "case and spaces are levelled, or both have at least "
    f"{SIMILAR:.0%} of the distinct runs of {WORDS} words that either has (Jaccard's index); "
    "system messages aside. Rows that a chain of such pairs links are one group.",
    "overlap": "A prompt is all that comes before the last answer; prompts and rows are levelled "
    "in the same way.",
}
"""What is counted, as the page says it."""


class NamedGroup(NamedTuple):
    """Rows that say the same, by their places."""

    places: list[Place]
    """The first few of them."""
    num_rows: int
    similarity: float
    excerpt: str


class Repetition(NamedTuple):
    """Rows of which there are several."""

    num_groups: int
    num_rows: int
    """Rows in these groups; one of each group would be left if the others went."""
    groups: list[NamedGroup]
    """The largest."""


class Overlap(NamedTuple):
    """Validation rows that are trained on, one way or another."""

    num_val: int
    num_same_row: int
    """Their words, normalised, are those of a training row."""
    num_similar_row: int
    """In one group of similar rows with a training row; those above included."""
    num_same_prompt: int
    """What comes before their last answer is, normalised, that of a training row."""
    examples: list[tuple[str, str, str]]
    """A validation row, a training row, and what they share."""


def within(groups: Sequence[Group], num_train: int) -> list[Group]:
    """What is left of groups when rows from this one on are taken out."""
    inside = [
        group._replace(members=[m for m in group.members if m < num_train]) for group in groups
    ]
    return [group for group in inside if len(group.members) > 1]


def repetition(
    groups: Sequence[Group], texts: Sequence[str], places: Sequence[Place]
) -> Repetition:
    """Groups in numbers, the largest by name."""
    largest = sorted(groups, key=lambda group: -len(group.members))[:SHOWN]
    named = [
        NamedGroup(
            [places[row] for row in group.members[:SHOWN]],
            len(group.members),
            group.similarity,
            texts[group.members[0]][:EXCERPT],
        )
        for group in largest
    ]
    return Repetition(len(groups), sum(len(group.members) for group in groups), named)


def overlap(
    texts: Sequence[str],
    prompts: Sequence[str],
    similar: Sequence[Group],
    num_train: int,
    places: Sequence[Place],
) -> Overlap:
    """What validation shares with training.

    Args:
        texts: Every row's words; those from ``num_train`` on are validation rows.
        prompts: The same of their prompts; empty where there is none.
        similar: Groups of similar rows among them all.
        num_train: How many of them are trained on.
        places: Their files and row numbers.
    """
    first_with: dict[str, dict[Any, int]] = {
        "the whole row": _firsts(texts[:num_train]),
        "nearly the whole row": {
            row: group.members[0]
            for group in similar
            if group.members[0] < num_train
            for row in group.members
        },
        "the prompt": _firsts(prompts[:num_train]),
    }
    counts: Counter[str] = Counter()
    examples: list[tuple[str, str, str]] = []
    for row in range(num_train, len(texts)):
        keys = (texts[row], row, prompts[row])
        shared = {
            what: others[key]
            for (what, others), key in zip(first_with.items(), keys, strict=True)
            if key in others
        }
        counts.update(shared.keys())
        if shared and len(examples) < SHOWN:
            what, other = next(iter(shared.items()))
            examples.append((str(places[row]), str(places[other]), what))
    same_row, similar_row, same_prompt = (counts[what] for what in first_with)
    return Overlap(len(texts) - num_train, same_row, similar_row, same_prompt, examples)


def _firsts(texts: Sequence[str]) -> dict[str, int]:
    """The first row of each text that is not empty."""
    firsts: dict[str, int] = {}
    for row, text in enumerate(texts):
        if text:
            firsts.setdefault(text, row)
    return firsts
