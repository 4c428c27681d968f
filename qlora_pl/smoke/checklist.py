"""What was tried, one line each, with its time; a failure is one sentence with its cause."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_pl.errors import QLoRAError
from qlora_pl.redaction import redact

Status = Literal["passed", "failed", "left out", "not reached"]
MARKS: dict[str, tuple[str, str]] = {
    "passed": ("\u2713", "ok"),
    "failed": ("\u2717", "NO"),
    "left out": ("\u2013", "--"),
    "not reached": ("\u2013", "--"),
}
"""Of each status: for terminals that can show it, and for others."""
STEPS = (
    "configuration",
    "base",
    "tokenizer",
    "template",
    "data",
    "train",
    "resume",
    "validate",
    "generate",
    "merge",
    "reload",
)
"""In their order."""


class StepError(Exception):
    """What a step found that no error of the project says; one sentence."""


@dataclass
class Step:
    """One thing that was tried."""

    name: str
    status: Status = "not reached"
    seconds: float = 0.0
    said: str = ""
    """What came of it, in a clause; of a failure, the sentence with its cause."""
    more: list[str] = field(default_factory=list)
    """Lines to be shown under it."""

    def leave_out(self, reason: str) -> None:
        """There is nothing to try."""
        self.status, self.said = "left out", reason

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "step": self.name,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "said": self.said,
            "more": self.more,
        }


class Checklist:
    """Runs steps in order, and tells each when it is over.

    Args:
        tell: Takes each line as it comes.
        in_words: Puts names of temporary folders back into the user's own.
        has_marks: Whether the terminal can show a tick.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        in_words: Callable[[str], str] = lambda text: text,
        has_marks: bool = True,
    ) -> None:
        self.tell, self.in_words, self.has_marks = tell, in_words, has_marks
        self.steps = {name: Step(name) for name in STEPS}

    @property
    def has_failed(self) -> bool:
        """Whether a step did."""
        return any(step.status == "failed" for step in self.steps.values())

    @contextmanager
    def step(self, name: str, shows_failure: bool = True) -> Iterator[Step]:
        """Time a block, and take its error for the step's failure, so that others can be tried.

        Args:
            name: Of the step.
            shows_failure: Whether its line is told if it fails.
        """
        step, began = self.steps[name], time.monotonic()
        step.status = "passed"
        try:
            yield step
        except (QLoRAError, StepError) as error:
            self._fail(step, str(error))
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            step.status = "not reached"
            raise
        except Exception as error:  # whatever a library raises is this step's failure
            self._fail(step, f"{name}: {last_line(error)}")
        step.seconds = time.monotonic() - began
        if shows_failure or step.status != "failed":
            self.show(step)

    def take(self, plain: dict[str, Any]) -> None:
        """A step that another process has tried."""
        step = self.steps[plain["step"]]
        step.status, step.seconds = plain["status"], plain["seconds"]
        step.said = self.in_words(plain["said"])
        step.more = [self.in_words(line) for line in plain["more"]]
        self.show(step)

    def show(self, step: Step) -> None:
        """Tell a step's line."""
        self.tell(self.line(step))
        for line in step.more:
            self.tell(f"      {line}")

    def show_rest(self) -> None:
        """Tell what was not reached."""
        for step in self.steps.values():
            if step.status == "not reached":
                self.tell(self.line(step))

    def line(self, step: Step) -> str:
        """A step in one line."""
        mark = MARKS[step.status][0 if self.has_marks else 1]
        if step.status == "not reached":
            return f"{mark} {step.name:14}{'':7} not reached"
        return f"{mark} {step.name:14}{step.seconds:5.1f} s {step.said}"

    def _fail(self, step: Step, sentence: str) -> None:
        first, *rest = redact(self.in_words(sentence)).strip().splitlines() or [step.name]
        step.status, step.said, step.more = "failed", first, rest


def last_line(error: BaseException) -> str:
    """What a traceback ends with: the type of an error, and the first line of what it says."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return text[0] if text else type(error).__name__
