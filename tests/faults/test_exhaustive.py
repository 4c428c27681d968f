"""Every file operation of a start, of a resumed start, of a save and of the end fails once."""

from __future__ import annotations

import pytest

from faults.runs import Runs
from faults.sweeps import ACTIONS, PARTS, Sweep


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("part", PARTS)
def test_whichever_operation_fails_nothing_is_lost(runs: Runs, part: str, action: str) -> None:
    outcomes = list(Sweep(runs, part).outcomes(action))
    assert len(outcomes) > 20
    lost = [outcome for outcome in outcomes if outcome.problems]
    assert not lost, "\n\n".join(f"{outcome}\n{outcome.said}" for outcome in lost)
