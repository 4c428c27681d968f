"""How a run is made small, and how what was tried is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qlora_pl.errors import ConfigurationError
from qlora_pl.smoke.checklist import Checklist
from qlora_pl.smoke.shrunken_run import accumulation, number_of_ranks


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, 1),
        ({"devices": 1}, 1),
        ({"devices": "auto", "strategy": "auto"}, 1),
        ({"devices": 8}, 2),
        ({"devices": [0, 1, 2]}, 2),
        ({"devices": "4"}, 2),
        ({"devices": "0,1"}, 2),
        ({"devices": "1"}, 1),
        ({"devices": [3]}, 1),
        ({"num_nodes": 4, "devices": 1}, 2),
        ({"strategy": "ddp"}, 2),
        ({"strategy": "fsdp2_offload", "devices": 1}, 2),
        ({"strategy": SimpleNamespace(class_path="qlora_pl.strategies.ddp.AdapterDDP")}, 2),
    ],
)
def test_two_processes_stand_for_several_devices(settings: dict[str, Any], ranks: int) -> None:
    trainer = SimpleNamespace(**{"devices": "auto", "strategy": "auto", "num_nodes": 1} | settings)
    assert number_of_ranks(trainer) == ranks


@pytest.mark.parametrize(
    ("data", "accumulate", "expected"),
    [
        ({"global_batch_size": 16, "batch_size": 1}, None, 2),
        ({"global_batch_size": 8, "batch_size": 8}, None, 1),
        ({"global_batch_size": None, "batch_size": 4}, 4, 2),
        ({"global_batch_size": None, "batch_size": 4}, 1, 1),
        ({"global_batch_size": 4, "batch_size": 8, "tokens_per_batch": 512}, None, 2),
    ],
)
def test_a_run_that_accumulates_does_so_still(
    data: dict[str, Any], accumulate: int | None, expected: int
) -> None:
    run = SimpleNamespace(
        data=SimpleNamespace(**{"tokens_per_batch": None} | data),
        trainer=SimpleNamespace(accumulate_grad_batches=accumulate),
    )
    assert accumulation(run) == expected


def test_a_failure_is_one_sentence_and_what_was_not_tried_says_so() -> None:
    lines: list[str] = []
    checklist = Checklist(lines.append, lambda text: text.replace("/tmp/x", "mine"))
    with checklist.step("configuration") as step:
        step.said = "fine"
    with checklist.step("base"):
        raise ConfigurationError(["model: '/tmp/x' is no base.", "data: no rows."])
    with checklist.step("tokenizer"):
        raise KeyError("architectures")
    checklist.show_rest()
    assert [line.split()[:2] for line in lines[:2]] == [
        ["\u2713", "configuration"],
        ["\u2717", "base"],
    ]
    assert lines[0].endswith("fine")
    assert lines[1].endswith("model: 'mine' is no base.")
    assert lines[2].strip() == "data: no rows."
    assert lines[3].endswith("tokenizer: KeyError: 'architectures'")
    assert lines[-1].split() == ["\u2013", "reload", "not", "reached"]
    assert checklist.has_failed
