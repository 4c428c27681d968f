"""Beside another program: the same files and rows, in processes that take turns."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import bench_runs
import pytest
from bench_runs import SMALL, Bench, refused

bench = bench_runs.bench
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs in this process


@pytest.mark.slow
def test_transformers_trains_on_the_same_rows_to_the_same_losses(
    bench: Bench, tiny_base: Path
) -> None:
    """The same packed file and tokens in processes of their own; adapters start elsewhere."""
    words = ("--shape", tiny_base, *SMALL, "--warmup", 1, "--steps", 2, "--accumulation", 2)
    code, out, err = bench(*words, "--against", "hf", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["losses_agree"]
    ours, theirs = record["turns"]["qlora_pl"], record["turns"]["hf"]
    assert len(ours) == len(theirs) == 2
    assert ours[0]["tokens_of_steps"] == theirs[0]["tokens_of_steps"]
    assert len(theirs[0]["losses"]) == 3
    assert (record["ratio"] is None) == (record["refused"] is not None)


@pytest.mark.slow
def test_a_step_can_be_cut_otherwise_for_the_other_program(bench: Bench, tiny_base: Path) -> None:
    words = ("--shape", tiny_base, "--tokens-per-micro", 512, "--seq", 64, "--r", 8)
    words += ("--warmup", 1, "--steps", 1, "--lengths", "alpaca")
    code, out, err = bench(*words, "--against", "hf", "--against-accumulation", 3, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["their_micro_batches"] == 3
    assert record["losses_agree"]
    err = refused(bench(*words, "--against", "hf", "--against-accumulation", 500))
    assert "cannot be cut into 500 micro-batches" in err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the extra `bench`")
@pytest.mark.parametrize("packing", ["true", "false"])
def test_trl_trains_on_the_same_packs_to_the_same_losses(
    bench: Bench, tiny_base: Path, packing: str
) -> None:
    words = ("--shape", tiny_base, *SMALL, "--warmup", 1, "--steps", 2, "--packing", packing)
    code, out, err = bench(*words, "--against", "trl", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["losses_agree"], record["largest_relative_difference_of_losses"]
    ours, theirs = record["turns"]["qlora_pl"], record["turns"]["trl"]
    assert ours[0]["tokens_of_steps"] == theirs[0]["tokens_of_steps"]
    assert len(theirs[0]["losses"]) == 3
