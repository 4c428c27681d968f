"""The shrunken run as ``fit`` runs it: trained, saved, killed by SIGKILL, and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from qlora_pl.proof.comparison import read_rows
from qlora_pl.proof.cut import CutRun
from qlora_pl.proof.processes import (
    Ended,
    run_folder,
    run_to_end,
    run_until_saved,
    saved_step,
    sentences,
)
from qlora_pl.smoke.checklist import StepError
from qlora_pl.smoke.shrunken_run import KILLED_AFTER, STEPS, ShrunkenRun

ATTEMPTS = 2
"""At killing a run before it is over."""
LOG = "fit.log"


class Training:
    """Starts the run twice.

    Args:
        run: The shrunken one.
        words: The user's own words.
        place: A folder, for the run's root and its log.
    """

    def __init__(self, run: ShrunkenRun, words: list[str], place: Path) -> None:
        self.run = run
        self.log = place / LOG
        self.root = place / "runs"
        self.started = CutRun(
            words=(*words, *run.words),
            name=run.name,
            steps=STEPS,
            learning_rate=0.0,
            is_deterministic=False,
        )
        self._rows: list[dict[str, str]] = []

    @property
    def folder(self) -> Path:
        """Of the run."""
        found = run_folder(self.started, self.root)
        if found is None:
            raise StepError("fit made no folder for its run.")
        return found

    def until_killed(self) -> str:
        """Train three steps and kill the run; what came of it, in a clause.

        Raises:
            StepError: why it did not come that far.
        """
        for number in range(1, ATTEMPTS + 1):
            root = self.root if number == 1 else self.root.with_name(f"runs-{number}")
            self.root = root
            ended = run_until_saved(self.started, root, self.log, KILLED_AFTER, _say_nothing)
            if ended.exit_code != 0:
                break
        saved = saved_step(self.started, self.root)
        if saved < KILLED_AFTER:
            raise StepError(self._cause(ended))
        self._rows = read_rows(self.folder / "metrics.csv")
        if ended.exit_code == 0:
            raise StepError(f"the run was over before it could be killed after step {saved}.")
        losses = _losses(self._rows)
        shown = f"loss {losses[0]:.2f} to {losses[-1]:.2f}, " if losses else ""
        return f"{saved} steps, {shown}saved, then killed by SIGKILL"

    def resumed(self) -> str:
        """Resume it to its end; what came of it, in a clause.

        Raises:
            StepError: why it did not continue.
        """
        before, num_said = self.folder, len(sentences(self.log))
        ended = run_to_end(self.started, self.root, self.log, _say_nothing)
        if ended.exit_code != 0:
            raise StepError(self._cause(ended, num_said))
        if self.folder != before:
            raise StepError("it began a new run instead of resuming the one that was killed.")
        rows = read_rows(self.folder / "metrics.csv")
        steps = [int(row["step"]) for row in rows if int(row["step"])]
        if sorted(set(steps)) != list(range(1, STEPS + 1)):
            raise StepError(
                f"the resumed run has rows of the steps {sorted(set(steps))} in its metrics.csv, "
                f"not of 1 to {STEPS}."
            )
        # The saved step's own row is written once the next step has ended.
        before_kill = [row for row in self._rows if int(row["step"]) < KILLED_AFTER]
        if [row for row in rows if int(row["step"]) < KILLED_AFTER] != before_kill:
            raise StepError("the steps before the kill are told otherwise after the resume.")
        losses = _losses(rows)
        shown = f", loss {losses[-1]:.2f}" if losses else ""
        return f"went on after step {KILLED_AFTER} to step {_step_of(self.folder)}{shown}"

    def _cause(self, ended: Ended, num_said: int = 0) -> str:
        """Why a run ended: its own sentences, or else the last line of its traceback."""
        if told := sentences(self.log)[num_said:]:
            return "\n".join(dict.fromkeys(told))
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        if ended.exit_code == -signal.SIGKILL:
            return (
                "fit was killed from outside before its first save; is there enough memory, about "
                f"2 GB for each of {self.run.ranks} process(es)?"
            )
        return f"fit: {lines[-1].strip()}" if lines else f"fit ended with {ended.exit_code}."


def _losses(rows: list[dict[str, str]]) -> list[float]:
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


def _step_of(folder: Path) -> int:
    for product in ("adapter", "model"):
        manifest = folder / product / "manifest.json"
        if manifest.is_file():
            found: Any = json.loads(manifest.read_text())["step"]
            return int(found)
    raise StepError("the finished run has neither an adapter nor a model in its folder.")


def _say_nothing(_: int) -> None:
    """Nobody watches."""
