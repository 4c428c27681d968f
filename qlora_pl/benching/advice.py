"""One sentence of advice that follows from what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PADDING, DATA, IDLE, OPTIMIZER, ATTENTION, DEQUANTISATION, ELEMENT_WISE = (
    0.20,
    0.05,
    0.25,
    0.10,
    0.35,
    0.15,
    0.45,
)
"""Shares of a step (of its tokens, for padding) from which a part is worth a sentence."""
ROOM = 0.5
"""Share of a GPU's memory below which activations could be kept instead of computed again."""


def advice(record: Mapping[str, Any], recomputes: bool, kind: str) -> str:
    """What to change first, by the largest loss that a setting can take away.

    Args:
        record: Of the measurement: ``speed``, ``memory``, ``parts``.
        recomputes: Whether activations are computed again in the backward pass.
        kind: Of device.
    """
    padding = record["speed"]["padding_ratio"]
    if padding > PADDING:
        return (
            f"{padding:.0%} of what is computed is padding: set data.packing: true, or "
            "data.tokens_per_batch."
        )
    if record["parts"] is None:
        return "No steps were profiled (--profiled 0), so that there is nothing to advise on."
    shares: Mapping[str, float] = record["parts"]["shares"]
    if shares["data"] > DATA:
        return f"{shares['data']:.0%} of a step waits for rows: set data.num_workers to 1 or more."
    if shares["communication"] > IDLE:
        return (
            f"{shares['communication']:.0%} of a step is communication: raise "
            "trainer.accumulate_grad_batches or the micro-batch, or use fewer devices."
        )
    if shares["idle"] > IDLE:
        waits = "the GPU waits for Python" if kind == "cuda" else "Python and waiting"
        return (
            f"{shares['idle']:.0%} of a step is {waits}: give it larger micro-batches "
            "(data.batch_size or data.tokens_per_batch) and fewer of them a step."
        )
    if shares["optimizer"] > OPTIMIZER:
        return (
            f"{shares['optimizer']:.0%} of a step is the optimizer: take "
            "model.optimizer.name: adamw_torch, a lower model.lora.r, or more rows a step."
        )
    if shares["dequantisation"] > DEQUANTISATION:
        return (
            f"{shares['dequantisation']:.0%} of a step decodes weights, which takes as long for "
            "one token as for a thousand: give it larger micro-batches."
        )
    if recomputes and _has_room(record["memory"]["of_timed_steps"]):
        return (
            "Less than half of the GPU's memory was used, and a third of the arithmetic computes "
            "activations again: try model.gradient_checkpointing: false."
        )
    if shares["attention"] > ATTENTION:
        return (
            f"{shares['attention']:.0%} of a step is attention, which grows with the square of the "
            "rows' length: shorten data.max_length, or take "
            "model.attn_implementation: flash_attention_2."
        )
    if shares["element-wise"] > ELEMENT_WISE:
        return (
            f"{shares['element-wise']:.0%} of a step is element-wise work: set "
            "model.lora.dropout: 0, and compute in bfloat16 where the device has it."
        )
    largest = max(shares, key=lambda name: shares[name])
    return (
        f"The largest part of a step is {largest} ({shares[largest]:.0%}), and no setting is known "
        f"to waste much of the rest: {record['compute']['hfu']:.0%} of what this device can do is "
        "done."
    )


def _has_room(peak: Mapping[str, int]) -> bool:
    whole = peak.get("card")
    return whole is not None and peak["reserved"] < ROOM * whole
