"""The paper's figure 6 as the plan has it: how much less QLoRA takes than its alternatives."""

from __future__ import annotations

import pytest

from qlora_pl.planning.memory.memory_plan import COMPONENTS
from qlora_pl.planning.reports.figures import GROUPS, METHODS, SIZES, grouped, plan_of, reduction


@pytest.mark.parametrize("size", SIZES)
def test_nine_tenths_of_full_fine_tuning_are_saved(size: str) -> None:
    assert reduction(size, "full fine-tuning") >= 0.9


@pytest.mark.parametrize(
    ("size", "share"), [("7B", 0.60), ("13B", 0.63), ("33B", 0.66), ("65B", 0.68)]
)
def test_what_is_saved_over_16_bit_lora_is_what_the_formula_gives(size: str, share: float) -> None:
    """Weights 2 bytes against 0.516, all else alike; the paper claims more than 65 %."""
    assert reduction(size, "16-bit LoRA") == pytest.approx(share, abs=0.015)


def test_full_fine_tuning_takes_twelve_bytes_a_weight_and_its_activations() -> None:
    """As the paper counts its 780 GB for 65B: 16-bit weights and gradients, 32-bit AdamW."""
    plan = plan_of("65B", "full fine-tuning")
    fixed = plan.before_overhead - plan.components["activations"]
    assert fixed >= 12 * 65_285_660_672
    assert fixed / (12 * 65_285_660_672) < 1.01


def test_every_component_is_drawn_in_a_group() -> None:
    assert set(GROUPS) == set(COMPONENTS.values())
    for size in SIZES:
        for method in METHODS:
            plan = plan_of(size, method)
            assert sum(grouped(plan).values()) == plan.total
