"""A random so-many rows of a stream whose length nobody knows, in one pass."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import TypeVar

Item = TypeVar("Item")


def sample_rows(rows: Iterable[Item], count: int, seed: int) -> Iterator[Item]:
    """So many rows, each subset as likely as any other, in their order in the stream.

    Each position gets a key out of ``seed`` and itself, and the smallest keys stay. So the same
    rows are drawn on every machine, and a smaller sample is part of a larger one with its seed.

    Args:
        rows: The stream; ``count`` rows of it are held at a time.
        count: How many are drawn; all are, if there are fewer.
        seed: Of the draw.
    """
    key = seed.to_bytes(16, "little")
    kept: list[tuple[int, int, Item]] = []  # a heap with the largest key on top
    for position, row in enumerate(rows):
        digest = blake2b(position.to_bytes(8, "little"), digest_size=8, key=key).digest()
        entry = (-int.from_bytes(digest, "little"), -position, row)
        if len(kept) < count:
            heapq.heappush(kept, entry)
        elif entry[0] > kept[0][0]:
            heapq.heapreplace(kept, entry)
    # by position alone: rows cannot be compared
    yield from (row for _, _, row in sorted(kept, key=lambda entry: -entry[1]))
