"""From two comparisons to one sentence: proven, not proven, or as near as two equal runs are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qlora_pl.proof.comparison import FINAL, Comparison
from qlora_pl.proof.cut import CutRun

NOISE_FACTOR = 4.0
"""How far beyond the distance of two uninterrupted runs the resumed one may lie.

That distance is one draw of what chance does, the largest over all weights, and the resumed run's
is another; largest values of many draws scatter by far less than four times.
"""
MOST_DETAILS = 8


@dataclass(frozen=True)
class Interruption:
    """Where a run was killed."""

    step: int
    """The newest step that was saved."""
    is_inside_an_epoch: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the runs show."""

    kind: str
    """``proven``, ``within noise`` or ``not proven``."""
    sentence: str
    details: tuple[str, ...] = ()
    """The first differences, a line each."""
    is_repeatable: bool | None = None
    """Whether two uninterrupted runs are equal byte by byte; None: they were not compared."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """For the record."""

    @property
    def is_good(self) -> bool:
        """Whether a user may trust the run with days."""
        return self.kind != "not proven"


def judge(repeat: Comparison, resumed: Comparison, run: CutRun, killed: Interruption) -> Verdict:
    """Hold the resumed run against the uninterrupted one, and that against itself.

    Args:
        repeat: Of two uninterrupted runs.
        resumed: Of the first of them and the one that was killed and resumed.
        run: The user's, cut.
        killed: Where.
    """
    numbers = _numbers(repeat, resumed, run)
    where = f"killed after step {killed.step} of {run.steps}"
    where += " inside an epoch" if killed.is_inside_an_epoch else " at the end of an epoch"
    if not repeat.differences and not resumed.differences:
        sentence = (
            f"proven: {where} and resumed, the run ends in the bytes of the uninterrupted one "
            f"({resumed.num_adapter_tensors} tensors of the adapter, "
            f"{resumed.num_checkpoint_values} values of the last checkpoint, "
            f"{resumed.num_rows} rows of metrics.csv)."
        )
        return Verdict(kind="proven", sentence=sentence, is_repeatable=True, numbers=numbers)
    if not repeat.differences:
        return _not_proven(resumed, run, where, numbers)
    return _among_noise(repeat, resumed, run, where, numbers)


def could_not_resume(failure: str, killed: Interruption) -> Verdict:
    """The verdict on a run that does not start again."""
    return Verdict(
        kind="not proven",
        sentence=f"not proven: killed after step {killed.step}, the run does not resume: {failure}",
    )


def _not_proven(resumed: Comparison, run: CutRun, where: str, numbers: dict[str, Any]) -> Verdict:
    first = resumed.differences[0]
    hint = ""
    if uses_cuda() and not run.is_deterministic:
        hint = " On CUDA chance alone may do that: set trainer.deterministic: true and try again."
    return Verdict(
        kind="not proven",
        sentence=(
            f"not proven: {where} and resumed, the run differs first {first.sentence()}; "
            f"{len(resumed.differences)} values differ, the final adapter by up to "
            f"{numbers['resumed_difference_in_learning_rates']:.3g} learning rates.{hint}"
        ),
        details=_details(resumed),
        is_repeatable=True,
        numbers=numbers,
    )


def _among_noise(
    repeat: Comparison, resumed: Comparison, run: CutRun, where: str, numbers: dict[str, Any]
) -> Verdict:
    noise = numbers["repeat_difference_in_learning_rates"]
    distance = numbers["resumed_difference_in_learning_rates"]
    apart = (
        f"bytes cannot be compared, as two uninterrupted runs differ too: first "
        f"{repeat.differences[0].sentence()}, in the final adapter by up to {noise:.3g} learning "
        "rates"
    )
    advice = advise(run)
    known = {(d.step, d.part, d.name) for d in repeat.differences}
    strange = [
        d
        for d in resumed.differences
        if (d.step, d.part, d.name) not in known and not d.is_arithmetic
    ]
    if strange:
        reason = f"the resumed one differs {strange[0].sentence()} besides, which they share"
    elif distance > NOISE_FACTOR * noise:
        reason = f"the resumed one ({where}) by {distance:.3g}, far more than that"
    else:
        sentence = (
            f"within noise: {apart}; the resumed one ({where}) by {distance:.3g}, as any other "
            f"would. {advice}"
        )
        return Verdict(
            kind="within noise",
            sentence=sentence,
            details=_details(repeat),
            is_repeatable=False,
            numbers=numbers,
        )
    return Verdict(
        kind="not proven",
        sentence=f"not proven: {apart}; {reason}. {advice}",
        details=_details(resumed),
        is_repeatable=False,
        numbers=numbers,
    )


def advise(run: CutRun) -> str:
    """What would make two uninterrupted runs equal."""
    if uses_cuda() and not run.is_deterministic:
        return "trainer.deterministic: true makes equal runs equal, and this a proof."
    return (
        "Something draws or computes differently at each start (a callback of yours, an operation "
        "without a deterministic form); find it first."
    )


def uses_cuda() -> bool:
    """Whether the runs could see a CUDA device."""
    return torch.cuda.is_available()


def _details(comparison: Comparison) -> tuple[str, ...]:
    told = [f"differs {difference.sentence()}" for difference in comparison.differences]
    more = len(told) - MOST_DETAILS
    return (*told[:MOST_DETAILS], *([f"and {more} more values"] if more > 0 else []))


def _numbers(repeat: Comparison, resumed: Comparison, run: CutRun) -> dict[str, Any]:
    return {
        "repeat_difference_in_learning_rates": repeat.largest_in_adapter / run.learning_rate,
        "resumed_difference_in_learning_rates": resumed.largest_in_adapter / run.learning_rate,
        "num_adapter_tensors": resumed.num_adapter_tensors,
        "num_checkpoint_values": resumed.num_checkpoint_values,
        "num_rows": resumed.num_rows,
        "compared_steps": list(resumed.steps),
        "num_differences": len(resumed.differences),
        "first_difference": asdict(resumed.differences[0]) if resumed.differences else None,
        "first_difference_of_equal_runs": (
            asdict(repeat.differences[0]) if repeat.differences else None
        ),
        "final_adapter_differs": any(d.part == FINAL for d in resumed.differences),
    }
