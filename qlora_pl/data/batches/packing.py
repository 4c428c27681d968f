"""Rows -> packs of up to so many tokens, over a whole epoch at once, so that almost none are empty.

Best-fit decreasing: the longest row that is left goes into the fullest pack that still takes it.
Rows of one length are placed together and packs with the same room are kept together, so that a
million rows take a fraction of a second.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Lists of rows in one flat array: what is in each pack, or in each micro-batch."""

    rows: np.ndarray
    """``(num_rows,)`` int64 row numbers, list after list."""
    starts: np.ndarray
    """``(num_lists + 1,)`` int64; list i is ``rows[starts[i]:starts[i + 1]]``."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.rows[self.starts[number] : self.starts[number + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """``(num_lists,)`` sum of the rows' values in each list; no list may be empty."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(values[self.rows], self.starts[:-1])


def pack_rows(
    lengths: np.ndarray, rows: np.ndarray, capacity: int, generator: np.random.Generator
) -> Ragged:
    """Put rows into packs; how many packs there are depends on the lengths alone.

    Args:
        lengths: ``(num_rows,)`` tokens of each row of the split, none above ``capacity``.
        rows: The rows to pack, by number; one that stands there twice is packed twice.
        capacity: Tokens that a pack may have.
        generator: Decides which of the rows of one length goes where.

    Returns:
        The rows of each pack, longest first.
    """
    order = rows[generator.permutation(len(rows))]
    order = order[np.argsort(-lengths[order], kind="stable")]
    pack_of_place, num_packs = place_decreasing(lengths[order], capacity)
    by_pack = np.argsort(pack_of_place, kind="stable")
    sizes = np.bincount(pack_of_place, minlength=num_packs)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Ragged(order[by_pack], starts)


def place_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the number of the pack that each row goes into, and of all packs.

    Of rows of length l, the pack with the least room r >= l takes r // l: after the first it has
    the least room of all. So every pack is looked at once for each length at most.

    Args:
        lengths: ``(num_rows,)``, from the longest to the shortest, each 1 to ``capacity``.
        capacity: Tokens that a pack may have.

    Raises:
        ValueError: if a row is longer than a pack, or has no token.
    """
    if len(lengths) and not 1 <= lengths[-1] <= lengths[0] <= capacity:
        raise ValueError(f"rows have {lengths[-1]} to {lengths[0]} tokens, a pack {capacity}")
    pack_of_place = np.zeros(len(lengths), dtype=np.int64)
    open_packs = _OpenPacks(capacity)
    ends = np.flatnonzero(np.diff(lengths, append=0))  # the last row of each length
    start = 0
    for end in ends.tolist():
        length = int(lengths[end])
        while start <= end:
            room, packs = open_packs.take(length, end + 1 - start)
            each = room // length
            placed = min(len(packs) * each, end + 1 - start)
            pack_of_place[start : start + placed] = np.repeat(packs, each)[:placed]
            full, rest = divmod(placed, each)
            open_packs.put(room - each * length, packs[:full])
            if rest:
                open_packs.put(room - rest * length, packs[full : full + 1])
            start += placed
    return pack_of_place, open_packs.number


class _OpenPacks:
    """Packs by the room that they have left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.number = 0
        self._rooms: list[int] = []
        """Which amounts of room there are, sorted."""
        self._packs: dict[int, list[np.ndarray]] = {}

    def take(self, length: int, num_rows: int) -> tuple[int, np.ndarray]:
        """Packs with the least room for this length, as many as the rows need of those there are.

        Opens packs if none has the room.
        """
        place = bisect_left(self._rooms, length)
        room = self._rooms[place] if place < len(self._rooms) else self.capacity
        needed = -(-num_rows // (room // length))
        if place == len(self._rooms):
            self.number += needed
            return room, np.arange(self.number - needed, self.number)
        piles = self._packs[room]
        packs = piles.pop()
        if len(packs) > needed:
            piles.append(packs[needed:])
            packs = packs[:needed]
        if not piles:
            del self._packs[room], self._rooms[place]
        return room, packs

    def put(self, room: int, packs: np.ndarray) -> None:
        """Give packs back with the room that they have now; full ones are never asked for again."""
        if not room or not len(packs):
            return
        if room not in self._packs:
            insort(self._rooms, room)
            self._packs[room] = []
        self._packs[room].append(packs)


def fewest_packs(lengths: np.ndarray, capacity: int) -> int:
    """A number of packs that no way of packing goes below (Martello and Toth's L2, 1990).

    For each threshold t up to half a pack: rows above ``capacity - t`` fill a pack each, rows above
    half need one each, and what those leave must hold the rows from t on.
    """
    if not len(lengths):
        return 0
    number = np.bincount(lengths, minlength=capacity + 2)  # of rows of each length
    tokens = number * np.arange(capacity + 2)
    number_from = np.cumsum(number[::-1])[::-1]  # of rows at least so long
    tokens_from = np.cumsum(tokens[::-1])[::-1]
    half = capacity // 2 + 1  # the shortest length of which no two share a pack
    thresholds = np.arange(half)
    alone = capacity + 1 - thresholds  # rows from this length on share with none from t on
    shared_room = (number_from[half] - number_from[alone]) * capacity
    shared_room -= tokens_from[half] - tokens_from[alone]
    small = tokens_from[thresholds] - tokens_from[half]
    more = np.maximum(0, -(-(small - shared_room) // capacity))
    return int((number_from[half] + more).max())


def describe_packing(lengths: np.ndarray, num_packs: int, capacity: int) -> str:
    """How full packs are, beside how full they could be; one line for the log."""
    tokens = int(lengths.sum())

    def waste(packs: int) -> float:
        return 1 - tokens / max(packs * capacity, 1)

    fewest = fewest_packs(lengths, capacity)
    return (
        f"{len(lengths):,} rows in {num_packs:,} packs of {capacity:,} tokens, "
        f"{waste(num_packs):.2%} of them empty (no fewer than {fewest:,} packs could hold them, "
        f"{waste(fewest):.2%} empty)"
    )
