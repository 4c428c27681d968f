"""Rows that say the same: character by character, after normalising, or nearly.

Nearly: at least ``SIMILAR`` of the distinct runs of three words that two rows have, both have
(Jaccard's index). Candidates come from MinHash (Broder 1997) in bands; each pair is then compared
exactly, so that none is listed that is not one, while about one pair in a hundred at the very
threshold is missed (and one in 10,000 at 0.8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

SIMILAR = 0.7
WORDS = 3
"""Words of a run; rows of fewer are compared as a whole only."""
BANDS, ROWS_PER_BAND = 16, 4
_BYTES_AT_A_TIME = 1 << 22


class Group(NamedTuple):
    """Rows that say the same."""

    members: list[int]
    """Two or more, from the first on."""
    similarity: float
    """Of the first two; 1: all are the same."""


def same(keys: Sequence[object]) -> list[Group]:
    """Groups of rows with equal keys, in the order of their first rows."""
    groups: dict[object, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return [Group(members, 1.0) for members in groups.values() if len(members) > 1]


def alike(texts: Sequence[str]) -> list[Group]:
    """Groups of rows that say the same or nearly the same, in the order of their first rows.

    Two rows are in one group if a chain of such pairs leads from one to the other.

    Args:
        texts: Normalised: words with one space between them.
    """
    leader = np.arange(len(texts))
    for group in same(texts):
        leader[group.members] = group.members[0]
    firsts = np.flatnonzero(leader == np.arange(len(texts)))
    distinct = [texts[row] for row in firsts.tolist()]
    parent = _join_similar(distinct)
    groups: dict[int, list[int]] = {}
    place_of = {int(row): place for place, row in enumerate(firsts)}
    for row, first in enumerate(leader.tolist()):
        groups.setdefault(_find(parent, place_of[first]), []).append(row)
    return [
        Group(members, similarity(texts[members[0]], texts[members[1]]))
        for members in groups.values()
        if len(members) > 1
    ]


def similarity(one: str, other: str) -> float:
    """Jaccard's index of the two texts' runs of words; 1 for equal texts."""
    if one == other:
        return 1.0
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b) if a and b else 0.0


@lru_cache(maxsize=4096)
def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The distinct runs of ``WORDS`` words."""
    words = text.split(" ")
    return frozenset(zip(*(words[start:] for start in range(WORDS)), strict=False))


def _join_similar(texts: Sequence[str]) -> list[int]:
    """For each text, a parent that leads to the first of its group."""
    parent = list(range(len(texts)))
    for one, other in _candidates(_signatures(texts)):
        a, b = _find(parent, one), _find(parent, other)
        if a != b and similarity(texts[one], texts[other]) >= SIMILAR:
            parent[max(a, b)] = min(a, b)
    return parent


def _find(parent: list[int], place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place


def _candidates(signatures: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs that agree in a band: each member with the first, and with the one before it."""
    rows = np.flatnonzero((signatures != _EMPTY).any(axis=1))
    for band in range(BANDS):
        keys = np.zeros(len(rows), np.uint64)
        for column in range(band * ROWS_PER_BAND, (band + 1) * ROWS_PER_BAND):
            keys = _mix(keys ^ signatures[rows, column])
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
        for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
            members = rows[order[start:end]].tolist() if end - start > 1 else []
            for place, member in enumerate(members[1:]):
                yield members[0], member
                if place:
                    yield members[place], member


# -- MinHash ---------------------------------------------------------------------------------------

_EMPTY = np.uint64(2**64 - 1)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every bit of the result depends on all bits."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """``(num_texts, BANDS * ROWS_PER_BAND)`` uint64; ``_EMPTY`` for texts without a run of words.

    Of each of so many orders of all hashes, the first hash of a text: the share of equal entries
    of two texts estimates their similarity.
    """
    multipliers = _mix(np.arange(1, BANDS * ROWS_PER_BAND + 1, dtype=np.uint64) * _ODD) | np.uint64(
        1
    )
    signatures = np.full((len(texts), len(multipliers)), _EMPTY, np.uint64)
    with tqdm(
        total=len(texts), desc="comparing", unit=" rows", unit_scale=True, delay=1.0, leave=False
    ) as bar:
        for start, end in _parts(texts):
            hashes, starts = _hashed_runs(texts[start:end])
            has_runs = np.flatnonzero(np.diff(starts))
            if len(hashes):
                for column, multiplier in enumerate(multipliers):
                    # a product with an odd number is an order of its own, by its upper bits
                    least = np.minimum.reduceat(hashes * multiplier, starts[has_runs])
                    signatures[start + has_runs, column] = least
            bar.update(end - start)
    return signatures


def _parts(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    start = size = 0
    for row, text in enumerate(texts):
        size += len(text)
        if size > _BYTES_AT_A_TIME:
            yield start, row + 1
            start, size = row + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _hashed_runs(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of words, and where those of each text start (``num_texts + 1`` places).

    A word's hash is a polynomial of its bytes, taken out of sums over the whole text.
    """
    data = np.frombuffer("\n".join([*texts, ""]).encode(), np.uint8)
    is_end = (data == ord(" ")) | (data == ord("\n"))
    ends = np.flatnonzero(is_end)
    begins = np.r_[0, ends[:-1] + 1]
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(data) + 1, _ODD, np.uint64))
        inverse = np.uint64(pow(int(_ODD), -1, 2**64))
        inverses = np.cumprod(np.full(len(data) + 1, inverse, np.uint64))
        sums = np.r_[np.uint64(0), np.cumsum(data * powers[:-1])]
        words = _mix((sums[ends] - sums[begins]) * inverses[begins])
        runs = np.zeros(max(len(words) - WORDS + 1, 0), np.uint64)
        for place in range(WORDS):
            runs = _mix(runs * _ODD ^ words[place : place + len(runs)])
    text_of = np.cumsum(data[ends] == ord("\n")) - (data[ends] == ord("\n"))
    lasts = text_of[WORDS - 1 :]
    is_within = text_of[: len(runs)] == lasts[: len(runs)]
    starts = np.searchsorted(text_of[: len(runs)][is_within], np.arange(len(texts) + 1))
    return runs[is_within], starts
