"""``RankAgreement``: what all ranks must do alike, decided over all ranks.

A signal may reach one rank only, and only rank 0 knows that a disk is full; a rank that acted on
its own would leave the others waiting in an exchange. Words travel through a group of their own,
on the CPU: no device waits, and no exchange of the training can be mistaken for one of these.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

GO_ON = 0
FAILED = 1000
"""A rank cannot go on; outweighs every signal's number."""


class RankAgreement:
    """Exchanges a word, an integer of which the greatest counts, between all ranks.

    With one process nothing is exchanged, and a word counts at once.

    Args:
        world_size: Processes of the run; a group is made by all of them together.
        timeout: How long to wait for the others.
    """

    def __init__(self, world_size: int = 1, timeout: timedelta | None = None) -> None:
        self._group: Any = None
        if world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._world_size = world_size
        self._under_way: tuple[Any, torch.Tensor] | None = None

    def exchange(self, word: int) -> int:
        """Hand in a word, and take what was agreed on the words of the call before.

        So nobody waits for a rank that is less than a micro-batch behind.
        """
        if self._group is None:
            return word
        agreed = self._settle()
        words = torch.tensor([word])
        work = dist.all_reduce(words, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._under_way = (work, words)
        return agreed

    def agree(self, word: int) -> int:
        """The greatest of the words that were handed in up to now, this one included."""
        if self._group is None:
            return word
        earlier = self._settle()
        words = torch.tensor([max(word, earlier)])
        dist.all_reduce(words, op=dist.ReduceOp.MAX, group=self._group)
        return int(words)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self._world_size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _settle(self) -> int:
        if self._under_way is None:
            return GO_ON
        (work, words), self._under_way = self._under_way, None
        work.wait()
        return int(words)
