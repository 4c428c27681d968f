"""A few faults of each sort, for every run of the tests; ``make faults`` goes through all."""

from __future__ import annotations

import random

import pytest

from faults.damage import spoiler
from faults.fault import Fault
from faults.proving import prove
from faults.runs import Runs

CHECKPOINTS = "runs/tiny/version_0/checkpoints"


@pytest.mark.parametrize(
    ("action", "operation"),
    [
        ("kill", f"write {CHECKPOINTS}/.incomplete-step-00000004.ckpt"),
        ("EIO", f"rename {CHECKPOINTS}/step-00000004.ckpt"),
    ],
)
def test_a_save_that_breaks_loses_one_interval_and_no_more(
    runs: Runs, action: str, operation: str
) -> None:
    outcome = prove(runs, Fault(action=action, operation=operation))
    assert not outcome.problems, f"{outcome}\n{outcome.said}"
    assert outcome.ending == ("died" if action == "kill" else "said so and stopped")


@pytest.mark.parametrize("way", ["bit flip", "torn"])
def test_a_damaged_checkpoint_is_passed_over(runs: Runs, way: str) -> None:
    late = Fault(action="kill", moment="forward", occurrence=24)
    outcome = prove(runs, late, spoil=spoiler("checkpoint", way, random.Random(0)))
    assert not outcome.problems, f"{outcome}\n{outcome.said}"
    assert "Passed over the checkpoint" in outcome.said
