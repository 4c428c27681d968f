"""The kinds of faults that are drawn at random, and how each is drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from faults.damage import TARGETS, WAYS, spoiler
from faults.fault import Fault
from faults.moments import MOMENTS
from faults.proving import Outcome, prove
from faults.runs import Runs

READ = "read"


@dataclass(frozen=True)
class Passed:
    """What an uninterrupted run comes by: the places at which a fault can be put."""

    operations: tuple[tuple[str, int], ...]
    """Labels of operations that change files, each with how often it has come."""
    reads: tuple[tuple[str, int], ...]
    moments: Counter[str]

    @classmethod
    def of(cls, events: list[dict[str, Any]]) -> Passed:
        """From a run's log."""
        operations = numbered(events)
        return cls(
            tuple(o for o in operations if not o[0].startswith(READ)),
            tuple(o for o in operations if o[0].startswith(READ)),
            Counter(event["moment"] for event in events if "moment" in event),
        )

    def operation(self, draw: random.Random, action: str, **more: Any) -> Fault:
        """A fault at any of the operations."""
        label, occurrence = draw.choice(self.operations)
        return Fault(action=action, operation=label, occurrence=occurrence, **more)

    def moment(self, draw: random.Random, action: str, names: Any = None, **more: Any) -> Fault:
        """A fault at any of the moments; each name is as likely as the next."""
        name = draw.choice(names or [name for name in MOMENTS if self.moments[name]])
        occurrence = draw.randint(1, self.moments[name])
        return Fault(action=action, moment=name, occurrence=occurrence, **more)


def numbered(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """The operations of a log, each with how often its label has come."""
    counts: Counter[str] = Counter()
    found = []
    for event in events:
        if (label := event.get("operation")) is not None:
            counts[label] += 1
            found.append((label, counts[label]))
    return found


@dataclass(frozen=True)
class Kind:
    """One row of the table."""

    name: str
    count: int
    """Injections of 220."""
    inject: Callable[[Runs, Passed, random.Random], Outcome]


def _killed_at_operation(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    return prove(runs, passed.operation(draw, "kill"))


def _power_cut(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    return prove(runs, passed.operation(draw, "power"))


def _killed_in_training(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    return prove(runs, passed.moment(draw, "kill"))


def _killed_at_a_time(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    seconds = draw.uniform(0.0, 0.9) * runs.seconds
    for _ in range(6):  # on a machine that is quicker than a moment ago the run may be over
        outcome = prove(runs, Fault(action="kill", after_seconds=seconds))
        if not any(problem.startswith("harness") for problem in outcome.problems):
            break
        seconds /= 2
    return outcome


def _killed_thrice(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    """Each start may find another's leftovers, and comes at least as far as the one before."""
    first = passed.moment(draw, "kill", ["forward", "backward", "optimizer"])
    rest = [Fault(action="kill", moment="loading rows", occurrence=draw.randint(1, 2))]
    rest.append(Fault(action="kill", moment="start", occurrence=1))
    return prove(runs, first, *rest)


def _terminated(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    return prove(runs, passed.moment(draw, "terminate"))


def _one_error(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    return prove(runs, passed.operation(draw, "EIO"))


def _unreadable(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    label, occurrence = draw.choice(passed.reads)
    return prove(runs, Fault(action="EIO", operation=label, occurrence=occurrence))


def _full_disk(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    labels = [o for o in passed.operations if o[0].split()[0] in ("open", "write", "mkdir")]
    label, occurrence = draw.choice(labels)
    fault = Fault(action="ENOSPC", operation=label, occurrence=occurrence, persists=True)
    return prove(runs, fault)


def _read_only(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    under = draw.choice(["runs", "cache", "tmp", "runs/tiny/version_0/checkpoints"])
    action = draw.choice(["EROFS", "EACCES"])
    if draw.random() < 0.5:
        return prove(runs, Fault(action=action, under=under, persists=True))
    inside = [o for o in passed.operations if o[0].split()[1].startswith(under)]
    label, occurrence = draw.choice(inside or list(passed.operations))
    fault = Fault(action=action, operation=label, occurrence=occurrence, persists=True)
    return prove(runs, replace(fault, under=under))


def _damaged(way: str) -> Callable[[Runs, Passed, random.Random], Outcome]:
    def inject(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
        late = Fault(action="kill", moment="step", occurrence=draw.randint(3, 8))
        return prove(runs, late, spoil=spoiler(draw.choice(TARGETS), way, draw))

    return inject


def _clock(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    hours = draw.choice([-26.0, -2.0, 2.0, 26.0, 1000.0])
    return prove(runs, passed.moment(draw, "jump", hours=hours))


def _clock_and_limit(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    """The limit is reached by the jump; a start after it has the time for itself."""
    fault = passed.moment(draw, "jump", ["forward", "backward", "loading rows"], hours=3.0)
    return prove(runs, fault, words=("--trainer.max_time", "00:01:00:00"), says_more=True)


def _out_of_memory(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    """What is split draws other dropout masks; a run that stops must come back to the same ones."""
    fault = passed.moment(draw, "memory", ["forward", "backward"])
    return prove(runs, fault, words=("--model.on_oom", "stop"))


def _dead_worker(runs: Runs, passed: Passed, draw: random.Random) -> Outcome:
    fault = Fault(action="die", moment="worker", occurrence=draw.randint(1, 8))
    return prove(runs, fault, words=("--data.num_workers", "1"))


KINDS = (
    Kind("kill at a file operation", 40, _killed_at_operation),
    Kind("power cut at a file operation", 20, _power_cut),
    Kind("kill in loading, forward, backward, optimizer, validation", 30, _killed_in_training),
    Kind("kill at a random time", 14, _killed_at_a_time),
    Kind("kill of three starts in a row", 8, _killed_thrice),
    Kind("SIGTERM", 16, _terminated),
    Kind("one I/O error while writing", 14, _one_error),
    Kind("one I/O error while opening to read", 8, _unreadable),
    Kind("disk full from some write on", 14, _full_disk),
    Kind("folder read-only, from the start or later", 10, _read_only),
    *(Kind(f"{way} in checkpoint, adapter or caches", 7, _damaged(way)) for way in WAYS),
    Kind("clocks jump by hours", 6, _clock),
    Kind("clocks jump beyond trainer.max_time", 3, _clock_and_limit),
    Kind("loader's process dies", 4, _dead_worker),
    Kind("out of memory in a step, with on_oom: stop", 6, _out_of_memory),
)


def draw_all(seed: int, count: int) -> list[tuple[Kind, int]]:
    """So many injections of all kinds, in their shares, each with a seed of its own."""
    total = sum(kind.count for kind in KINDS)
    drawn = random.Random(seed)
    pairs = [
        (kind, drawn.randrange(1 << 32))
        for kind in KINDS
        for _ in range(max(1, round(kind.count * count / total)))
    ]
    drawn.shuffle(pairs)
    return pairs
