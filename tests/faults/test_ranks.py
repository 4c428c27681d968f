"""Faults of one rank of two."""

from __future__ import annotations

import pytest

from faults.ranks import RANK_FAULTS, prove_ranks
from faults.runs import Runs


@pytest.mark.slow
@pytest.mark.parametrize("name", RANK_FAULTS)
def test_a_rank_that_breaks_ends_the_other_and_both_resume(runs: Runs, name: str) -> None:
    outcome = prove_ranks(runs, name)
    assert not outcome.problems, f"{outcome}\n{outcome.said}"
