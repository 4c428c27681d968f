"""MFU and HFU of a frozen base: by hand for a 7B, and held against what torch counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_runs import load
from torch.utils.flop_counter import FlopCounterMode

from qlora_pl.benching.figures import StepContent, hardware_operations, utilisation
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.compute import ComputeCost, compute_cost
from qlora_pl.modeling.loading.base_loading import prepare_for_training
from qlora_pl.modeling.steps.loss import causal_lm_loss

LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008
ADAPTED = 4 * (4096 + 4096) + 3 * (4096 + 11008)
LLAMA_7B = ComputeCost(
    matrices=32 * LAYER,
    head=32000 * 4096,
    adapters=32 * 64 * ADAPTED,
    attention=32 * 32 * 128,
)
"""With adapters of rank 64 on all its linear layers."""
ROW = StepContent(2048, 2048, 2048, 1, 2048**2)
"""One row of 2,048 tokens, all of them trained."""


def test_a_token_of_a_7b_costs_29_gigaflop_and_43_with_recomputation() -> None:
    """By hand, in billions a token: P 6.476, adapters 0.160, head 0.131, attention 0.268 a pass.

    4 x 6.476 + 6 x 0.160 + 4 x 0.131 + 2 x 0.268 x 3 = 29.0; recomputation adds
    2 x 6.476 + 2 x 0.160 + 2 x 0.268 = 13.8.
    """
    again = hardware_operations(LLAMA_7B, ROW, recomputes=True)
    found = utilisation(LLAMA_7B, [1.0], [ROW], True, measured_peak=1e15)
    assert found["model_flops_per_token"] / 1e9 == pytest.approx(29.0, abs=0.05)
    assert again / 2048 / 1e9 == pytest.approx(29.0 + 13.8, abs=0.1)
    assert found["mfu"] == pytest.approx(2048 * 29.0e9 / 1e15, rel=2e-3)
    assert found["hfu"] == pytest.approx(2048 * 42.8e9 / 1e15, rel=2e-3)


def test_full_fine_tuning_of_the_same_weights_would_cost_half_as_much_again() -> None:
    """6 a weight, because they have gradients of their own: they count where adapters do."""
    frozen = ComputeCost(matrices=1000, head=0, adapters=0, attention=0)
    trained = ComputeCost(matrices=0, head=0, adapters=1000, attention=0)
    step = StepContent(10, 10, 10, 1, 0)
    for recomputes, operations in ((False, (4, 6)), (True, (6, 8))):
        assert hardware_operations(frozen, step, recomputes) == operations[0] * 1000 * 10
        assert hardware_operations(trained, step, recomputes) == operations[1] * 1000 * 10


def two_rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :10] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_products_of_a_real_step_are_those_that_torch_counts(
    tiny_base: Path, recomputes: bool
) -> None:
    """Source: torch's FlopCounterMode over forward and backward; attention's products apart.

    What the formula counts too much, exactly. Kept: the input of the first layer has no gradient,
    so that its queries, keys and values multiply once less, frozen and adapted. Recomputed: that
    input has one, or nothing would be computed again; and a layer's second forward pass stops
    before its last product, an adapter's, whose result nobody needs.
    """
    batch = two_rows()
    base = load(tiny_base, quant_type="none").model
    model = attach_adapters(base, LoRAConfig(r=4), 0)
    prepare_for_training(model, recomputes)
    cost = compute_cost(model)
    with FlopCounterMode(display=False) as counter:
        causal_lm_loss(model, batch).total.backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for kind, n in counts.items() if str(kind) in ("aten.mm", "aten.addmm"))
    trained = int((batch["labels"][:, 1:] != -100).sum())
    step = StepContent(48, trained, 48, 2, 0)
    formula = hardware_operations(cost, step, recomputes)
    first = 2 * 48 * ((64 + 32 + 32) * 64 + 3 * 4 * 64)
    last = 2 * 48 * (2 * 4 * 64)
    assert formula - counted == (last if recomputes else first)
