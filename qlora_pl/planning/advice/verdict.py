"""Whether a plan fits into a card's memory, with paging or without, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_pl.planning.memory.memory_plan import MemoryPlan
from qlora_pl.planning.work.cards import GIB, Card

Kind = Literal["fits", "fits with paging", "does not fit"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a card's memory makes of a plan."""

    kind: Kind
    spare_bytes: int
    """Of the card beside the whole plan; below 0: what is missing without paging."""
    pageable_bytes: int
    """Optimizer state that can wait in host memory."""

    @property
    def fits(self) -> bool:
        """Whether the run can be trained on the card at all."""
        return self.kind != "does not fit"

    @property
    def missing_bytes(self) -> int:
        """What is missing even if all that can be paged is paged; 0: nothing."""
        return max(0, -(self.spare_bytes + self.pageable_bytes))

    def sentence(self, card: Card) -> str:
        """The verdict with its margin."""
        memory = f"{card.memory_bytes / GIB:.1f} GiB"
        if self.kind == "fits":
            return f"fits: {_gib(self.spare_bytes)} of {memory} are left over."
        if self.kind == "fits with paging":
            return (
                f"fits with paging: {_gib(-self.spare_bytes)} more than {memory} are needed at the "
                f"peak, and {_gib(self.pageable_bytes)} of optimizer state can wait in host memory."
            )
        even = ", not even with paging" if self.pageable_bytes else ""
        return (
            f"does not fit{even}: {_gib(self.missing_bytes)} more than {memory} are needed"
            f"{' with all of the optimizer state in host memory' if self.pageable_bytes else ''}."
        )


def judge(plan: MemoryPlan, card: Card) -> Verdict:
    """Compare a plan with the memory of each device."""
    spare = card.memory_bytes - int(plan.total)
    pageable = int(plan.pageable)
    kind: Kind = "does not fit"
    if spare >= 0:
        kind = "fits"
    elif spare + pageable >= 0:
        kind = "fits with paging"
    return Verdict(kind=kind, spare_bytes=spare, pageable_bytes=pageable)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
