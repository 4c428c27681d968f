"""A few faults of each sort, for every run of the tests; ``make faults`` goes through all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from faults.damage import spoiler
from faults.fault import Fault
from faults.proving import prove
from faults.runs import Runs
from qlora_pl.training.run_folders.run_folder import checkpoints_newest_first, digest_path

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


@pytest.mark.parametrize("action", ["EIO", "ENOSPC"])
def test_a_run_goes_on_without_curves_if_their_file_fails(runs: Runs, action: str) -> None:
    fault = Fault(action=action, operation="write runs/tiny/version_0/events", occurrence=9)
    outcome = prove(runs, fault)
    assert not outcome.problems, f"{outcome}\n{outcome.said}"
    assert outcome.ending == "went on"
    assert outcome.said.count("the run goes on without curves") == 1


@pytest.mark.parametrize("name", ["checkpoint", "digest"])
def test_any_bit_of_a_checkpoint_and_its_digest_may_flip(runs: Runs, name: str) -> None:
    """The highest bit of a byte of text makes it no text."""

    def spoil(workplace: Path) -> str:
        run = runs.all(workplace)[0]
        path = checkpoints_newest_first(run)[0]
        path = path if name == "checkpoint" else digest_path(path)
        data = bytearray(path.read_bytes())
        data[70] ^= 0x80
        path.write_bytes(data)
        return path.name

    late = Fault(action="kill", moment="forward", occurrence=24)
    outcome = prove(runs, late, spoil=spoil)
    assert not outcome.problems, f"{outcome}\n{outcome.said}"
