"""Faults at random places of whole runs; ``FAULTS_SEED`` and ``FAULTS_COUNT`` choose others."""

from __future__ import annotations

import random

import pytest

from faults.jobs import seed_and_count
from faults.kinds import KINDS, Kind, Passed, draw_all
from faults.runs import Runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_whatever_happens_the_resumed_run_ends_as_the_uninterrupted_one(
    runs: Runs, kind: Kind
) -> None:
    seed, count = seed_and_count()
    print(f"FAULTS_SEED={seed} FAULTS_COUNT={count}")
    passed = Passed.of(runs.warm_run.events)
    seeds = [own for drawn, own in draw_all(seed, count) if drawn is kind]
    outcomes = [kind.inject(runs, passed, random.Random(own)) for own in seeds]
    assert len(outcomes) > 0
    lost = [outcome for outcome in outcomes if outcome.problems]
    assert not lost, "\n\n".join(f"{outcome}\n{outcome.said}" for outcome in lost)


def test_two_hundred_are_drawn_and_every_kind_is_among_them() -> None:
    drawn = draw_all(0, 220)
    assert len(drawn) >= 200
    assert {kind.name for kind, _ in drawn} == {kind.name for kind in KINDS}
    assert drawn == draw_all(0, 220) != draw_all(1, 220)
