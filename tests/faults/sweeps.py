"""Exhaustively: each operation of a part of a run fails, one after another, until none is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.fault import SPACE, Fault
from faults.kinds import READ, numbered
from faults.proving import Outcome, newest_step, prove
from faults.runs import NUM_STEPS, Runs

SAVED = 6
"""The step whose save is swept through: one with a validation, and with an older one to delete."""
KILLED_AFTER = 5
"""The step after which the run is killed whose resuming is swept through."""
PARTS = {
    "start": "a start with empty caches, until the first step has ended",
    "resume": f"a start that resumes at step {KILLED_AFTER - 1}, until its first step has ended",
    "save": f"from the end of step {SAVED} to the next save: a save, its check, what it replaces",
    "end": "from the end of the last step to the end of the command",
}
ACTIONS = ("kill", "error")


class Sweep:
    """The operations of one part of a run.

    Args:
        runs: Starts runs.
        part: One of ``PARTS``.
    """

    def __init__(self, runs: Runs, part: str) -> None:
        self.runs = runs
        self.part = part
        self._resumable = None
        if part == "resume":
            self._resumable = _killed(runs)
            events = runs.run(runs.copy(self._resumable)).events
        else:
            events = (runs.cold_run if part == "start" else runs.warm_run).events
        begin, end = _bounds(events, part)
        skipped = len(numbered(events[:begin]))
        found = numbered(events[:end])[skipped:]
        self.operations = [place for place in found if not place[0].startswith(READ)]
        self.reads = [place for place in found if place[0].startswith(READ)]

    def faults(self, action: str) -> list[Fault]:
        """One at each operation, ``kill`` or ``error``.

        The error is a full disk, from then on, where the operation takes space; else one of the
        disk's own.
        """
        found = []
        for label, occurrence in self.operations:
            is_full = action == "error" and label.split()[0] in SPACE
            name = action if action == "kill" else "ENOSPC" if is_full else "EIO"
            found.append(
                Fault(action=name, operation=label, occurrence=occurrence, persists=is_full)
            )
        return found

    def outcome(self, fault: Fault) -> Outcome:
        """Of one fault."""
        if self._resumable is not None:
            workplace = self.runs.copy(self._resumable)
        else:
            workplace = self.runs.new_workplace(is_warm=self.part != "start")
        return prove(self.runs, fault, workplace=workplace)

    def outcomes(self, action: str) -> Iterator[Outcome]:
        """Of every fault of an action."""
        for fault in self.faults(action):
            yield self.outcome(fault)


def _killed(runs: Runs) -> Path:
    """A run that was killed a step after a whole save; on a busy machine not each one is."""
    for _ in range(50):
        place = runs.new_workplace()
        killed = runs.run(place, Fault(action="kill", moment="step", occurrence=KILLED_AFTER))
        assert killed.is_reached
        if newest_step(runs, place) == KILLED_AFTER - 1:
            return place
    raise AssertionError(f"no save of step {KILLED_AFTER - 1} was written before step 5 had ended")


def _bounds(events: list[dict[str, Any]], part: str) -> tuple[int, int]:
    def step(number: int) -> int:
        return next(i for i, event in enumerate(events) if event.get("step") == number)

    if part == "start":
        return 0, step(1)
    if part == "resume":
        return 0, step(KILLED_AFTER)
    if part == "end":
        return step(NUM_STEPS), len(events)
    following = f"step-{SAVED + 2:08d}"
    begin = step(SAVED)
    end = next(i for i, event in enumerate(events) if following in event.get("operation", ""))
    # Its folder is filled under a temporary name before anything says which step it is of.
    return begin, min(end, step(SAVED + 2))
