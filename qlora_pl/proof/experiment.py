"""The four runs of a proof, in their order, and the record of what came of them."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import write_json
from qlora_pl.proof.comparison import compare_runs, read_rows
from qlora_pl.proof.cut import RECORD, CutRun, clear
from qlora_pl.proof.processes import (
    Ended,
    raise_as_told,
    run_folder,
    run_to_end,
    run_until_saved,
    saved_step,
    sentences,
)
from qlora_pl.proof.verdict import Interruption, Verdict, could_not_resume, judge
from qlora_pl.redaction import redact

RUNS = ("uninterrupted", "uninterrupted-again", "interrupted")
"""Roots in the proof's folder; the last is started twice."""
NUM_STARTS = 4
ATTEMPTS = 3
"""At killing a run before it is over."""


def perform(run: CutRun, folder: Path) -> dict[str, Any]:
    """Run four times, compare, and write ``resume_proof.json``.

    Args:
        run: The user's, cut.
        folder: Where it all goes; runs of a proof that holds are removed again.

    Returns:
        The record.

    Raises:
        ConfigurationError: what ``fit`` says of a mistake.
        TrainingStoppedError: if an uninterrupted run fails, or is over before it can be killed.
    """
    clear(folder, RUNS)
    watch = Progress(run, folder)
    whole, again = watch.whole("uninterrupted"), watch.whole("uninterrupted-again")
    repeat = compare_runs(whole, again)
    epochs = epochs_by_step(read_rows(whole / "metrics.csv"))
    saved = watch.interrupt(stopping_step(epochs, run.steps))
    interruption = Interruption(saved, is_inside(epochs.get(saved, 0)))
    if failure := watch.resume():
        verdict = could_not_resume(failure, interruption)
    else:
        resumed = run_folder(run, folder / RUNS[2])
        assert resumed is not None
        verdict = judge(repeat, compare_runs(whole, resumed), run, interruption)
    record = make_record(verdict, run, interruption, watch)
    write_json(folder / RECORD, record)
    if verdict.is_good:
        for name in RUNS:
            shutil.rmtree(folder / name, ignore_errors=True)
    return record


def epochs_by_step(rows: list[dict[str, str]]) -> dict[int, float]:
    """Epochs done after each step, in fractions, as ``metrics.csv`` says."""
    return {int(row["step"]): float(row["epoch"] or 0) for row in rows}


def stopping_step(epochs: dict[int, float], steps: int) -> int:
    """The step to kill after: inside an epoch if there is one, and nearest to the middle.

    Args:
        epochs: From ``epochs_by_step``, of an uninterrupted run.
        steps: How many it has.
    """
    return min(
        range(1, steps),
        key=lambda step: (not is_inside(epochs.get(step, 0)), abs(step - steps / 2)),
    )


def is_inside(epochs: float) -> bool:
    """Whether so many epochs end inside one; a stream without a length counts none."""
    return epochs != int(epochs) or epochs == 0


class Progress:
    """Starts the runs, says on stderr how far they are, and remembers how they went.

    Args:
        run: The user's, cut.
        folder: Of the proof.
    """

    def __init__(self, run: CutRun, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.ended: list[dict[str, Any]] = []
        self._said = ""
        print(
            f"prove-resume: {NUM_STARTS} runs of {run.steps} steps (uninterrupted, the same again, "
            f"killed, resumed), each a whole start of fit, in {folder}",
            file=sys.stderr,
        )

    def whole(self, name: str) -> Path:
        """One uninterrupted run; its folder."""
        root, log = self.folder / name, self.folder / f"{name}.log"
        ended = run_to_end(self.run, root, log, lambda step: self._tell(name, step))
        self._note(name, ended, log)
        raise_as_told(ended, log)
        return self._folder_of(root)

    def interrupt(self, step: int) -> int:
        """A run that is killed after a step's save; the newest step that is saved then."""
        name, is_over = RUNS[2], False
        root, log = self.folder / name, self.folder / f"{name}.log"
        for _ in range(ATTEMPTS):
            ended = run_until_saved(
                self.run, root, log, step, lambda saved: self._tell("to be killed", saved)
            )
            is_over = ended.exit_code == 0 or saved_step(self.run, root) >= self.run.steps
            if not is_over:
                break
            shutil.rmtree(root, ignore_errors=True)
        self._note("killed", ended, log)
        if is_over:
            raise TrainingStoppedError(
                f"The run was over {ATTEMPTS} times before it could be killed after step {step} of "
                f"{self.run.steps}; give it more --steps."
            )
        if ended.exit_code > 0:
            raise_as_told(ended, log)
        return saved_step(self.run, root)

    def resume(self) -> str | None:
        """The same command once more; why that failed, or None."""
        name = RUNS[2]
        root, log = self.folder / name, self.folder / f"{name}.log"
        before = run_folder(self.run, root)
        num_said = len(sentences(log))
        ended = run_to_end(self.run, root, log, lambda step: self._tell("resumed", step))
        self._note("resumed", ended, log)
        if ended.exit_code != 0:
            said = sentences(log)[num_said:]
            return " ".join(said) or f"It ended with exit code {ended.exit_code}; read '{log}'."
        if run_folder(self.run, root) != before:
            return "It began a new run instead of resuming the one that was killed."
        return None

    def _folder_of(self, root: Path) -> Path:
        found = run_folder(self.run, root)
        assert found is not None, "a run that ended well has a folder"
        return found

    def _tell(self, name: str, step: int) -> None:
        if not sys.stderr.isatty():
            return
        number = len(self.ended) + 1
        said = f"run {number} of {NUM_STARTS}, {name}: step {step} of {self.run.steps} saved"
        if said != self._said:
            self._said = said
            print(f"\r\x1b[K{said}", end="", file=sys.stderr, flush=True)

    def _note(self, name: str, ended: Ended, log: Path) -> None:
        self.ended.append(
            {"run": name, "exit_code": ended.exit_code, "seconds": round(ended.seconds, 1)}
            | {"log": log.name}
        )
        start = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(
            f"{start}run {len(self.ended)} of {NUM_STARTS}, {name}: {ended.seconds:.0f} s",
            file=sys.stderr,
        )


def make_record(
    verdict: Verdict, run: CutRun, interruption: Interruption, watch: Progress
) -> dict[str, Any]:
    """What ``resume_proof.json`` holds."""
    return {
        "format": 1,
        "verdict": verdict.kind,
        "sentence": verdict.sentence,
        "details": list(verdict.details),
        "steps": run.steps,
        "killed_after_step": interruption.step,
        "is_inside_an_epoch": interruption.is_inside_an_epoch,
        "is_repeatable": verdict.is_repeatable,
        "is_deterministic": run.is_deterministic,
        "learning_rate": run.learning_rate,
        **verdict.numbers,
        "command": ["qlora-pl", "fit", *map(redact, run.words)],
        "runs": watch.ended,
        "versions": {name: version(name) for name in ("torch", "lightning", "bitsandbytes")},
    }
