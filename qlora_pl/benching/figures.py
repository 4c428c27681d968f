"""Steps that were timed -> the figures of a benchmark: tokens a second, MFU and HFU, spread.

The base is frozen, so its backward pass makes gradients of inputs alone: a token costs 4 operations
for each of its weights (6 for each of an adapter's), not the 6 of full fine-tuning.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_pl.benching.clock import summary
from qlora_pl.modeling.compute import ComputeCost

DEFINITION = (
    "MFU: operations that the rows' own tokens need, 4 for each frozen weight (6 for each of an "
    "adapter's), 4 of the head for trained tokens, 3 passes of attention; without padding and "
    "without what checkpointing computes again. HFU: padding and recomputation included."
)
TOLERATED_NATS = 0.5
"""How far the first loss over random tokens may lie from guessing, ln V."""


@dataclass(frozen=True)
class StepContent:
    """What a step was made of, whichever program took it."""

    tokens: int
    """Without padding."""
    trained_tokens: int
    padded_tokens: int
    """With padding: what the device computes."""
    rows: int
    token_pairs: int
    """Sum of the squared row lengths."""


def throughput(
    seconds: Sequence[float], contents: Sequence[StepContent], repeats: int
) -> dict[str, Any]:
    """Rates over all timed steps, and how far repeats lie apart.

    Args:
        seconds: Of each step, repeat after repeat.
        contents: What each was made of.
        repeats: How many windows of equal length they are.
    """
    whole = sum(seconds)
    size = len(seconds) // repeats
    windows = [
        sum(c.tokens for c in contents[start : start + size]) / sum(seconds[start : start + size])
        for start in range(0, repeats * size, size)
    ]
    return {
        "tokens_per_second": sum(c.tokens for c in contents) / whole,
        "trained_tokens_per_second": sum(c.trained_tokens for c in contents) / whole,
        "padded_tokens_per_second": sum(c.padded_tokens for c in contents) / whole,
        "samples_per_second": sum(c.rows for c in contents) / whole,
        "tokens_per_step": statistics.median(c.tokens for c in contents),
        "padding_ratio": 1
        - sum(c.tokens for c in contents) / sum(c.padded_tokens for c in contents),
        "step_seconds": summary(list(seconds)),
        "tokens_per_second_of_repeats": windows,
        "spread_of_repeats": max(windows) / min(windows),
    }


def utilisation(
    cost: ComputeCost,
    seconds: Sequence[float],
    contents: Sequence[StepContent],
    recomputes: bool,
    measured_peak: float,
    sheet_peak: float | None = None,
) -> dict[str, Any]:
    """MFU and HFU of the timed steps, against what this device has just done, and its data sheet.

    Args:
        cost: Of the model.
        seconds: Of each step.
        contents: What each was made of.
        recomputes: Whether activations are computed again in the backward pass.
        measured_peak: FLOP/s of a large product on this device.
        sheet_peak: FLOP/s that its maker promises; None: unknown.
    """
    useful = sum(cost.of_step(c.tokens, c.trained_tokens, c.token_pairs) for c in contents)
    done = sum(hardware_operations(cost, c, recomputes) for c in contents)
    rate, hardware_rate = useful / sum(seconds), done / sum(seconds)
    found: dict[str, Any] = {
        "definition": DEFINITION,
        "model_flops_per_second": rate,
        "hardware_flops_per_second": hardware_rate,
        "model_flops_per_token": useful / sum(c.tokens for c in contents),
        "peak_flops_per_second": measured_peak,
        "mfu": rate / measured_peak,
        "hfu": hardware_rate / measured_peak,
    }
    if sheet_peak is not None:
        found |= {
            "data_sheet_flops_per_second": sheet_peak,
            "mfu_of_data_sheet": rate / sheet_peak,
            "hfu_of_data_sheet": hardware_rate / sheet_peak,
        }
    return found


def hardware_operations(cost: ComputeCost, step: StepContent, recomputes: bool) -> float:
    """Operations of a step with its padding, and with a second forward pass of the layers.

    The head is outside of what is computed again. Attention over padding is not counted.
    """
    done = cost.of_step(step.padded_tokens, step.trained_tokens, step.token_pairs)
    if recomputes:
        products = step.padded_tokens * 2 * (cost.matrices + cost.adapters)
        done += products + 2 * cost.attention * step.token_pairs
    return done


def loss_problem(loss: float, vocabulary: int) -> str | None:
    """Why the first loss over random tokens cannot be that of a working model, or None."""
    expected = math.log(vocabulary)
    if math.isfinite(loss) and abs(loss - expected) < TOLERATED_NATS:
        return None
    return (
        f"the first loss is {loss:.3f} nats a token, where guessing among {vocabulary:,} tokens "
        f"costs {expected:.3f}; what was timed does not compute what it should"
    )
