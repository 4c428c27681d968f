"""One injection: a run breaks, what it left is looked at, it is resumed and compared.

``prove`` returns an ``Outcome`` whose ``problems`` are empty if nothing was lost; a fault that was
never reached is a problem too, the harness's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.fault import Fault
from faults.fork_server import Ended
from faults.runs import INTERVAL, Runs
from qlora_pl.errors import AdapterFolderError
from qlora_pl.modeling.folders.adapter_folder import read_adapter_folder
from qlora_pl.training.run_folders.run_folder import (
    checkpoints_newest_first,
    damage,
    newest_verified,
    step_of,
)

STOPPED = 1
MISTAKEN = 2
TERMINATED = 143
KILLED = -9


@dataclass
class Outcome:
    """What came of a fault."""

    fault: Fault | None
    damage: str = ""
    """What was done to which file."""
    ending: str = ""
    """``went on``, ``said so and stopped`` or ``died``."""
    sentence: str = ""
    lost_steps: int = 0
    """Steps that had to be trained again."""
    problems: list[str] = field(default_factory=list)
    said: str = ""
    """The outputs of all starts, for a reader who looks for the cause."""

    def __str__(self) -> str:
        what = ", ".join(filter(None, [_short(self.fault), self.damage]))
        return f"{what}: {self.ending}, {self.lost_steps} steps again; {self.problems or 'equal'}"


def _short(fault: Fault | None) -> str:
    if fault is None:
        return ""
    place = fault.operation or fault.moment
    if place is None:
        place = "start" if fault.after_seconds is None else f"{fault.after_seconds:.2f} s"
    always = " and from then on" if fault.persists else ""
    under = f" below {fault.under}" if fault.under else ""
    return f"{fault.action} at {place} ({fault.occurrence}){always}{under}"


def prove(
    runs: Runs,
    *faults: Fault,
    workplace: Path | None = None,
    spoil: Callable[[Path], str] | None = None,
    words: tuple[str, ...] = (),
    says_more: bool = False,
    **more: Any,
) -> Outcome:
    """Break a run, once a start, and resume it with the same command until it ends.

    Args:
        runs: Starts them, and knows what the uninterrupted run has left.
        faults: Of the first start, of the second, ...
        workplace: Where the run stands when the first fault comes; None: at its beginning.
        spoil: Damages files after the last fault, and says how.
        words: More of the command.
        says_more: Whether a start that ends early may have validated and answered where it ended.
        more: For ``Runs.run``.
    """
    place = workplace or runs.new_workplace()
    outcome = Outcome(faults[0] if faults else None)
    for fault in faults:
        saved, ended = newest_step(runs, place), runs.run(place, fault, *words, **more)
        outcome.said += ended.said
        outcome.problems += problems_of_ending(fault, ended)
        outcome.problems += torn_files(*runs.all(place))
        _describe(outcome, ended)
        done = max(ended.steps, saved)
        if _is_complete(runs, place):  # whatever came after that
            outcome.problems += _compared(runs, place, says_more)
            return outcome
        if spoil is None:
            outcome.problems += lost_saves(ended, newest_step(runs, place))
    damaged: list[str] = []
    if spoil is not None:
        outcome.damage = spoil(place)
        damaged = torn_files(*runs.all(place))
    whole = newest_step(runs, place)
    resumed = runs.run(place, None, *words, **more)
    outcome.said += "\n--- resumed ---\n" + resumed.said
    if any(resumed.codes):
        outcome.problems.append(f"the resumed run ended with {resumed.codes}")
        return outcome
    if (resumed.begins_at or 0) != whole:
        outcome.problems.append(f"resumed at {resumed.begins_at}, though step {whole} is whole")
    outcome.lost_steps = done - whole if faults else 0
    # What was damaged on purpose and is not read again stays as it is, and says so when it is read.
    found = _compared(runs, place, says_more, _folders(damaged))
    outcome.problems += [problem for problem in found if problem not in damaged]
    return outcome


def _describe(outcome: Outcome, ended: Ended) -> None:
    said = [line for line in ended.said.splitlines() if line.startswith("qlora-pl: ")]
    outcome.sentence = said[-1].removeprefix("qlora-pl: ") if said else ""
    endings = {0: "went on", KILLED: "died"}
    outcome.ending = endings.get(ended.code, "said so and stopped")


def problems_of_ending(fault: Fault, ended: Ended) -> list[str]:
    """A killed process is killed; any other ends well, or with a sentence and no traceback."""
    problems = []
    if not ended.is_reached:
        problems.append("harness: the fault was not reached")
    if ended.is_timeout:
        problems.append("the run hung")
    expected = {
        "kill": (KILLED,),
        "power": (KILLED,),
        "terminate": (TERMINATED, 0),
        "jump": (0,),
        "die": (STOPPED,),
    }
    codes = expected.get(fault.action, (0, STOPPED, MISTAKEN))
    if ended.code not in codes:
        problems.append(f"exit code {ended.code}")
    if fault.action not in ("kill", "power"):
        if "Traceback" in ended.said:
            problems.append("a traceback")
        if ended.code != 0 and "qlora-pl: " not in ended.said:
            problems.append("no sentence")
    return problems


def torn_files(*runs: Path) -> list[str]:
    """Whatever lies under its own name in a run's folder is whole, and has what belongs to it."""
    problems = []
    for run in runs:
        for path in checkpoints_newest_first(run):
            if (why := damage(path, anew=True)) is not None:
                problems.append(f"{path.name} is torn: {why}")
            elif not (run / "adapters" / path.stem).is_dir():
                problems.append(f"{path.name} has no adapter folder")
        for folder in [*run.glob("adapters/step-*"), *run.glob("adapter")]:
            if folder.name != "adapter" and not any(run.glob(f"checkpoints/{folder.name}.ckpt")):
                continue  # being deleted; nothing says that it is there
            try:
                read_adapter_folder(folder)
            except AdapterFolderError as error:
                problems.append(f"torn: {error}")
        for path in [*run.glob("*.json"), *run.glob("checkpoints/*.json")]:
            try:
                json.loads(path.read_text())
            except ValueError:
                if not path.name.startswith(".incomplete"):
                    problems.append(f"{path.name} is torn")
    return problems


def lost_saves(ended: Ended, saved: int) -> list[str]:
    """A save goes on in the background: the one that was being written may be lost, and no other.

    Args:
        ended: How the run ended.
        saved: The step of the newest checkpoint that verifies.
    """
    labels = " ".join(event.get("operation", "") for event in ended.events)
    begun = max((int(step) for step in re.findall(r"step-(\d{8})", labels)), default=0)
    problems = []
    if begun - saved > INTERVAL:
        problems.append(f"a save of step {begun} was begun, {saved} is saved")
    if ended.steps - max(begun, saved) > INTERVAL:
        problems.append(f"step {ended.steps} was done, and no save after {max(begun, saved)} begun")
    return problems


def newest_step(runs: Runs, workplace: Path) -> int:
    """Of the newest checkpoint that verifies; 0 if there is none."""
    for run in runs.all(workplace):
        if (newest := newest_verified(run)) is not None:
            return step_of(newest)
    return 0


def _is_complete(runs: Runs, workplace: Path) -> bool:
    run = runs.newest(workplace)
    try:
        return run is not None and json.loads((run / "metrics.json").read_text())["is_complete"]
    except (OSError, ValueError):
        return False


def _folders(problems: list[str]) -> set[str]:
    """The adapter folders that problems are about."""
    return set(re.findall(r"adapters/(step-\d{8})", " ".join(problems)))


def _compared(
    runs: Runs, workplace: Path, says_more: bool, damaged: Collection[str] = ()
) -> list[str]:
    try:
        left = runs.left(workplace).without(damaged)
    except (OSError, KeyError, ValueError) as error:
        return [f"the end is not there: {error}"]
    expected = runs.expected.without(damaged)
    different = left.differences(expected)
    if says_more and left.says_at_least(expected):
        different = [name for name in different if name not in ("history", "samples")]
    newest = runs.all(workplace)[0]  # an older one that was damaged on purpose stays as it is
    return [f"{name} differs" for name in different] + torn_files(newest)
