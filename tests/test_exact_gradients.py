"""The gradient of a step is that of the mean over all of its trained tokens, however it is cut.

The reference never sees a batch: each row alone through the same model, torch's cross-entropy over
its own logits, and the mean written out. In float64 both must agree to 1e-12 of a gradient's norm,
which leaves no room for a wrong weight, a forgotten token or a row that sees another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from adapter_runs import one_thread  # noqa: F401 (used by pytest)
from exact_runs import largest_error
from families import BY_NAME
from torch import Tensor, nn
from torch.nn import functional

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.batches.batching import BatchLayout, BatchShape, TrainingBatches
from qlora_pl.data.encoding.example import EncodedExample
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.modeling.steps.loss import Normalization, causal_lm_loss
from qlora_pl.modeling.steps.step import MicroBatch, sum_over_step

LONGEST = 24
EXACT = ["LLaMA", "Qwen3", "Phi-3", "GPT-NeoX, Pythia"]
IN_FLOAT32 = ["Gemma 2", "BLOOM"]
"""Compute their attention's softmax in float32, whatever they are given."""
SEES_OTHERS = ("BLOOM", "packed")
"""Which the certificate refuses."""
SHAPES = {
    "padded": BatchShape(),
    "all as wide": BatchShape(max_length=LONGEST, pads_to_max_length=True),
    "token budget": BatchShape(max_length=LONGEST, tokens_per_batch=2 * LONGEST),
    "packed": BatchShape(max_length=LONGEST, is_packed=True),
}


class Rows:
    """Random rows, each trained in places, some of whose tokens may weigh more or less."""

    def __init__(self, number: int, seed: int, is_weighted: bool = False) -> None:
        draw = np.random.default_rng(seed)
        examples = []
        for length in draw.integers(3, LONGEST, number):
            is_trained = draw.random(length) < draw.choice([0.15, 0.5, 0.9])
            is_trained[-1] = True
            ids = draw.integers(5, 500, length).astype(np.int32)
            examples.append(EncodedExample(ids, is_trained, is_trained))
        self.rows = EncodedRows.from_examples(examples)
        self.drawn = [draw.choice([0.25, 1.0, 3.0], len(row.input_ids)) for row in examples]
        self.is_weighted = is_weighted

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[row]

    @property
    def lengths(self) -> np.ndarray:
        return self.rows.lengths

    def weights(self, row: int) -> np.ndarray | None:
        return self.drawn[row].astype(np.float32) if self.is_weighted else None


def make_model(name: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """An unquantised two-layer model of a family, every weight trained, no dropout anywhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = BY_NAME[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.model_type, **family.settings)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


# -- the reference -------------------------------------------------------------------------------


def token_losses(model: nn.Module, rows: Any, row: int) -> tuple[Tensor, Tensor]:
    """Nats and weights of the trained tokens of one row, by plain torch."""
    ids, labels = (torch.from_numpy(array) for array in rows[row])
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    kept = labels[1:] != IGNORE_INDEX
    losses = functional.cross_entropy(logits[kept], labels[1:][kept], reduction="none")
    weights = rows.weights(row)
    weights = torch.ones(len(ids)) if weights is None else torch.from_numpy(weights)
    return losses, weights[1:][kept].to(losses.dtype)


def expected_gradients(
    model: nn.Module, rows: Any, micro_batches: Sequence[Sequence[int]], by: Normalization
) -> dict[str, Tensor]:
    """Of the mean that a step's loss is, as docs/data.md defines it.

    The gradient of a sum, divided at the end: LLaMA's, Qwen's and Phi's norms round their
    gradients to float32, and of another multiple to another number (1e-7 apart).
    """

    def mean(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        losses, weights = (torch.cat(column) for column in zip(*parts, strict=True))
        return (losses * weights).sum() / weights.sum()

    cut = [[token_losses(model, rows, row) for row in part] for part in micro_batches if part]
    of_rows = [row for part in cut for row in part if len(row[0])]
    if by == "tokens":
        losses, weights = (torch.cat(column) for column in zip(*of_rows, strict=True))
        return divided(gradients(model, (losses * weights).sum()), float(weights.sum()))
    means = [mean([row]) for row in of_rows]
    if by == "micro_batches":
        means = [mean(part) for part in cut if sum(len(row[0]) for row in part)]
    return divided(gradients(model, torch.stack(means).sum()), len(means))


def divided(tensors: dict[str, Tensor], number: float) -> dict[str, Tensor]:
    return {name: tensor / number for name, tensor in tensors.items()}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -- the project's way ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How steps are cut."""

    layout: tuple[int, int, int]
    """Batch size, accumulation, devices."""
    shape: str

    def devices(self, rows: Any, seed: int) -> list[TrainingBatches]:
        batch_size, accumulation, world_size = self.layout
        layouts = [
            BatchLayout(batch_size, accumulation, world_size, rank) for rank in range(world_size)
        ]
        return [TrainingBatches(rows, at, seed, True, 0, SHAPES[self.shape]) for at in layouts]


def steps(
    model: nn.Module, rows: Any, cut: Cut, by: Normalization, seed: int
) -> list[tuple[dict[str, Tensor], list[list[int]]]]:
    """Gradients of each step of an epoch, and the rows of its micro-batches on all devices.

    As a run does: sums are back-propagated and what they weigh is added up over all micro-batches
    and devices; the gradients are divided by it once.
    """
    devices = cut.devices(rows, seed)
    keys = devices[0].keys(1)
    found = []
    for step in sorted({key.step for key in keys}):
        remembered, parts, total = [], [], torch.zeros(())
        for key in (key for key in keys if key.step == step):
            for device in devices:
                batch = device[key]
                loss = causal_lm_loss(model, batch, by)
                remembered.append(MicroBatch.of(loss, batch))
                total = total + loss.total
                parts.append([row for row in batch["row_ids"].tolist() if row >= 0])
        sums = sum_over_step(remembered, world_size=1, device=torch.device("cpu"))
        of_sum = gradients(model, total)
        found.append((divided(of_sum, sums.weight), parts))
    return found


def draw_cut(draw: np.random.Generator, shape: str) -> Cut:
    batch_size, accumulation, world_size = (int(n) for n in draw.integers(1, 4, 3))
    return Cut((batch_size, accumulation, world_size), shape)


def check(
    name: str, dtype: torch.dtype, shape: str, by: Normalization, tolerance: float, seed: int
) -> float:
    """One epoch of random rows in a random cut, its partial last step included."""
    draw = np.random.default_rng(seed)
    rows = Rows(int(draw.integers(1, 9)), seed, is_weighted=bool(seed % 2))
    model = make_model(name, dtype)
    cut = draw_cut(draw, shape)
    worst, seen = 0.0, []
    for ours, parts in steps(model, rows, cut, by, seed):
        expected = expected_gradients(model, rows, parts, by)
        worst = max(worst, largest_error(ours, expected))
        seen += [row for part in parts for row in part]
    assert sorted(seen) == list(range(len(rows)))
    assert worst <= tolerance, (cut, len(rows), worst)
    return worst


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_in_float64_the_gradient_of_a_step_is_that_of_its_mean(name: str, shape: str) -> None:
    """1e-12: a few thousand additions in another order, each off by 1e-16 (measured: 2e-15)."""
    for seed in range(8):
        check(name, torch.float64, shape, "tokens", 1e-12, seed)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in IN_FLOAT32 for shape in SHAPES if (name, shape) != SEES_OTHERS],
)
def test_families_that_compute_parts_in_float32_agree_as_far_as_that_goes(
    name: str, shape: str
) -> None:
    """1e-6: their softmax is rounded to 6e-8, in rows of other widths."""
    for seed in range(4):
        check(name, torch.float64, shape, "tokens", 1e-6, seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by", ["rows", "micro_batches"])
def test_the_other_means_are_what_they_are_called(by: Normalization, shape: str) -> None:
    """Of rows: each row's mean counts once. Of micro-batches: each micro-batch's does."""
    for seed in range(8):
        check("LLaMA", torch.float64, shape, by, 1e-12, seed)


def test_the_means_differ() -> None:
    """Or the tests above could not tell them apart."""
    model, rows = make_model("LLaMA", torch.float64), Rows(6, 3)
    parts = [[0, 1, 2, 3], [4, 5]]
    made: list[Any] = [
        expected_gradients(model, rows, parts, by) for by in ("tokens", "rows", "micro_batches")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert largest_error(made[one], made[other]) > 0.05


@pytest.mark.parametrize("name", EXACT)
def test_in_float32_it_is_so_up_to_rounding(name: str) -> None:
    """2e-5: sums over a hundred tokens and two layers in another order (measured: 2e-6)."""
    for shape in SHAPES:
        for seed in range(3):
            check(name, torch.float32, shape, "tokens", 2e-5, seed)


@pytest.mark.parametrize("name", EXACT)
def test_a_packed_step_has_the_gradient_of_the_padded_one(name: str) -> None:
    """The same rows in one step; 1e-12 as above. Reported nats and tokens agree as well."""
    model, rows = make_model(name, torch.float64), Rows(8, 4)
    made: dict[str, Any] = {}
    for shape in SHAPES:
        ((found, parts),) = steps(model, rows, Cut((8, 8, 1), shape), "tokens", 0)
        made[shape] = found
        assert sorted(row for part in parts for row in part) == list(range(8))
    for shape in SHAPES:
        assert largest_error(made[shape], made["padded"]) <= 1e-12, shape


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_reported_is_per_token_whatever_the_weights(shape: str) -> None:
    """Source: the plain losses, row by row; 1e-12 as above."""
    model, rows = make_model("LLaMA", torch.float64), Rows(7, 5, is_weighted=True)
    (device,) = Cut((2, 2, 1), shape).devices(rows, 0)
    with torch.no_grad():
        batches = [device[key] for key in device.keys(0)]
        made = [MicroBatch.of(causal_lm_loss(model, batch), batch) for batch in batches]
        sums = sum_over_step(made, 1, torch.device("cpu"))
        plain = [token_losses(model, rows, row) for row in range(7)]
    losses, weights = (torch.cat(column) for column in zip(*plain, strict=True))
    assert sums.trained_tokens == len(losses)
    assert sums.nats == pytest.approx(float(losses.sum()), rel=1e-12)
    assert sums.weight == float(weights.sum())
    assert sums.tokens == rows.lengths.sum()
    assert sums.token_pairs == (rows.lengths**2).sum()
    assert sums.rows == 7
    assert sums.padded_tokens == sum(batch["input_ids"].numel() for batch in batches)
