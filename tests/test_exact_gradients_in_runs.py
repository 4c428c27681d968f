"""Whole runs through Lightning, on one process and on two, have exactly the gradient of the mean.

In float64, over an unquantised base; the reference is each row alone, as in
tests/test_exact_gradients.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_runs import one_thread  # noqa: F401 (used by pytest)
from exact_runs import largest_error, run, run_on_two
from families import Saver
from torch import Tensor
from torch.nn import functional

from qlora_pl.data.rows.encoded_rows import EncodedRows

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

SHAPES: dict[str, dict[str, Any]] = {
    "padded": {"batch_size": 2},
    "packed": {"batch_size": 1, "packing": True},
    "token budget": {"tokens_per_batch": 128},
}


def write(folder: Path, number: int, name: str = "rows.jsonl") -> str:
    rows = [
        {
            "prompt": "How many?" + " Or so?" * (n % 3),
            "response": "It is " + "so " * (n % 5) + f"{n}.",
        }
        for n in range(number)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def reference(module: Any, split: str = "train") -> list[Tensor]:
    """The nats of each row's trained tokens, one row at a time, in plain torch."""
    rows = module.trainer.datamodule.splits[split].rows
    model = module.model.eval()
    losses = []
    for number in range(len(rows)):
        ids, labels = (torch.from_numpy(array) for array in rows[number])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        kept = labels[1:] != -100
        losses.append(functional.cross_entropy(logits[kept], labels[1:][kept], reduction="none"))
    return losses


def expected(module: Any, row_ids: list[int], by: str = "tokens") -> dict[str, Tensor]:
    """Gradients of the mean over these rows: a sum's, divided at the end."""
    losses = [reference(module)[row] for row in row_ids]
    whole = torch.cat(losses).sum() if by == "tokens" else sum(row.mean() for row in losses)
    number = sum(len(row) for row in losses) if by == "tokens" else len(losses)
    module.zero_grad()
    whole.backward()
    return {name: p.grad / number for name, p in module.trained_tensors().items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("family", "accumulation", "by"),
    [("LLaMA", 4, "tokens"), ("GPT-NeoX, Pythia", 3, "tokens"), ("GPT-NeoX, Pythia", 4, "rows")],
)
def test_three_rows_where_every_window_is_partial_give_the_exact_mean(
    family: str, accumulation: int, by: str, shape: str, saved: Saver, tmp_path: Path
) -> None:
    """Lightning divides by an accumulation that such a window never reaches.

    1e-12: sums in another order in float64 (measured: 1e-15).
    """
    settings = {
        "base": str(saved(family)),
        "rows": write(tmp_path, 3),
        "folder": str(tmp_path),
        "data": SHAPES[shape],
        "accumulation": accumulation,
        "by": by,
        "epochs": 2,
        "gradient_checkpointing": family == "LLaMA",
    }
    module, noted = run(settings)
    losses = torch.cat(reference(module))
    assert len(noted.steps) == 2
    for step in noted.steps:
        assert sorted(step["row_ids"]) == [0, 1, 2]
        gradients = expected(module, [0, 1, 2], by)
        assert largest_error(step["gradients"], gradients) <= 1e-12
        assert step["loss"] == pytest.approx(float(losses.mean()), rel=1e-12)
        lengths = module.trainer.datamodule.splits["train"].rows.lengths
        assert step["counts"] == (3, len(losses), lengths.sum())
        assert step["token_pairs"] == (lengths**2).sum()


@pytest.mark.parametrize(
    "shape",
    [name if name == "padded" else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES],
)
def test_two_processes_have_the_steps_and_gradients_of_one(
    shape: str, saved: Saver, tmp_path: Path
) -> None:
    """Lightning's DistributedDataParallel over gloo: it averages what is to be added.

    Eleven rows, four or so a step; the last step leaves a process without rows. 1e-12 as above.
    """
    validation = write(tmp_path, 5, "val.jsonl")
    settings = {
        "base": str(saved("GPT-NeoX, Pythia")),
        "rows": write(tmp_path, 11),
        "folder": str(tmp_path),
        "data": SHAPES[shape] | {"val_sources": validation, "eval_batch_size": 2},
        "accumulation": 2,
    }
    module, one = run(settings)
    if shape == "padded":
        settings["data"]["batch_size"] = 1
    else:
        settings["accumulation"] = 1  # a pack or a whole micro-batch is not divided
    processes = run_on_two(settings, tmp_path)
    assert len(one.steps) == len(processes[0]["steps"]) > 1
    for number, step in enumerate(one.steps):
        parts = [process["steps"][number] for process in processes]
        rows = [row for part in parts for row in part["row_ids"] if row >= 0]
        assert sorted(rows) == sorted(step["row_ids"])
        gradients = expected(module, step["row_ids"])
        for part in (step, *parts):
            assert largest_error(part["gradients"], gradients) <= 1e-12
            assert part["loss"] == pytest.approx(step["loss"], rel=1e-12)
            assert part["counts"] == step["counts"]
            assert part["token_pairs"] == step["token_pairs"]
    mean = float(torch.cat(reference(module, "val")).mean())
    for noted in (one.validation, *(process["validation"] for process in processes)):
        assert noted["val/loss"] == pytest.approx(mean, rel=1e-6)  # logged in float32
        assert noted["val/perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-5)


def test_weights_below_one_are_divided_by_what_they_sum_to(
    saved: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token at 0.001: their sum is below 1, and the mean that of plain tokens.

    1e-7: 0.001 is rounded to float32 in the batch.
    """

    def weights(rows: EncodedRows, row: int) -> np.ndarray:
        return np.full(rows.lengths[row], 0.001, np.float32)

    monkeypatch.setattr(EncodedRows, "weights", weights, raising=False)
    settings = {
        "base": str(saved("GPT-NeoX, Pythia")),
        "rows": write(tmp_path, 3),
        "folder": str(tmp_path),
        "data": SHAPES["padded"],
        "accumulation": 4,
    }
    module, noted = run(settings)
    (step,) = noted.steps
    losses = torch.cat(reference(module))
    assert 0.001 * len(losses) < 1
    assert largest_error(step["gradients"], expected(module, [0, 1, 2])) <= 1e-7
    assert step["loss"] == pytest.approx(float(losses.mean()), rel=1e-12)
