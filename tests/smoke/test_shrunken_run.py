"""How a run is made small, and how what was tried is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from qlora_pl.cli import read_runs
from qlora_pl.errors import ConfigurationError
from qlora_pl.smoke.checklist import Checklist
from qlora_pl.smoke.procedure import Procedure
from qlora_pl.smoke.shrunken_run import STEPS, ShrunkenRun, accumulation, number_of_ranks, shrink


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


def shrunken(
    settings: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ShrunkenRun, Any]:
    """What a run becomes, and how ``fit`` reads that."""
    path = place / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    words = ["--config", str(path)]
    monkeypatch.setattr(Procedure, "_train", lambda _: None)
    (place / "test").mkdir()
    procedure = Procedure(words, place / "test", False, lambda _: None)
    assert procedure.perform() == 0
    assert procedure.random_base is not None
    assert procedure.tokenizer is not None
    assert procedure.rows is not None
    small = shrink(
        procedure.run, procedure.random_base, procedure.tokenizer, procedure.first, procedure.rows
    )
    [run] = read_runs([[*words, *small.words]])
    return small, run


@pytest.mark.filterwarnings("ignore:.*")
def test_a_run_of_long_answers_and_many_rows_becomes_one_that_fit_accepts(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minima and limits of the run's own would contradict the smaller numbers."""
    settings = {
        "model": {
            "model_name_or_path": str(tiny_base),
            "lora": {"r": 4},
            "decoding": {"min_new_tokens": 8},
            "gradient_checkpointing": "auto",
        },
        "data": {"sources": str(rows_file), "template": "guanaco", "batch_size": "auto"},
        "samples": {"decoding": {"min_new_tokens": 16}},
        "trainer": {
            "min_steps": 900,
            "max_steps": 1000,
            "num_sanity_val_steps": None,
            "strategy": "ddp",
            "devices": 4,
        },
    }
    small, run = shrunken(settings, tmp_path, monkeypatch)
    assert run.trainer.max_steps == STEPS
    assert run.trainer.min_steps is None
    assert (run.trainer.devices, small.ranks) == ("2", 2)
    assert run.trainer.accumulate_grad_batches == 1  # as val_check_interval is counted
    assert run.samples.decoding.min_new_tokens == run.samples.decoding.max_new_tokens
    told = "\n".join(small.changes)
    assert "data.batch_size: 2 instead of auto" in told
    assert "model.gradient_checkpointing: true instead of auto" in told
    assert "checkpoint.every_n_steps 3" in told
    not_tested = "\n".join(small.not_tested)
    assert "trainer.strategy: ddp over NCCL; 2 processes talked over gloo" in not_tested
    assert "what auto comes to" in not_tested
