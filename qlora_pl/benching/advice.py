"""One sentence of advice that follows from what was measured, and from what is set already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

USUAL = {
    "padding": 0.20,
    "data": 0.05,
    "communication": 0.25,
    "idle": 0.25,
    "optimizer": 0.10,
    "dequantisation": 0.15,
    "attention": 0.35,
    "element-wise": 0.45,
}
"""Shares of a step (of its tokens, for padding) up to which a part is what it has to be."""
ROOM = 0.5
"""Share of a GPU's memory below which activations could be kept instead of computed again."""
RECOMPUTED = ("dequantisation", "GEMM", "attention", "element-wise")
"""Of these parts a third is the second forward pass, where activations are computed again."""


@dataclass(frozen=True, kw_only=True)
class InUse:
    """What of a run is set how, so that nothing is advised that is there already."""

    kind: str = "cpu"
    """Of device."""
    recomputes: bool = False
    """Whether activations are computed again in the backward pass."""
    num_workers: int = 0
    """Processes of the loader."""
    window: int | None = None
    """Rows that are read at a time between epochs."""
    is_packed: bool = False
    """Whether rows are packed."""
    optimizer: str = "paged_adamw_32bit"
    """As model.optimizer.name."""
    dropout: float = 0.0
    """The adapters'."""
    dtype: str = "bfloat16"
    """Of products."""
    attention: str = "auto"
    """As model.attn_implementation."""


def advice(record: Mapping[str, Any], use: InUse) -> str:
    """What to change first: what takes most above its usual share and can be set otherwise.

    Args:
        record: Of the measurement: ``speed``, ``memory``, ``parts``, ``compute``.
        use: What is set.
    """
    padding = record["speed"]["padding_ratio"]
    if record["parts"] is None:
        if padding > USUAL["padding"] and not use.is_packed:
            return _of_padding(padding, use)
        return "No steps were profiled (--profiled 0), so that there is nothing to advise on."
    shares: dict[str, float] = dict(record["parts"]["shares"])
    # Epochs may end between the profiled steps: what was read for them was timed in all others.
    shares["data"] = max(shares["data"], record.get("reading_ratio", 0.0))
    found = dict(_losses(padding, shares, record, use))
    if found:
        return found[max(found)]
    largest = max(shares, key=lambda name: shares[name])
    return (
        f"The largest part of a step is {largest} ({shares[largest]:.0%}), and no setting is known "
        f"to waste much of the rest: {record['compute']['hfu']:.0%} of what this device can do is "
        "done."
    )


def _losses(
    padding: float, shares: Mapping[str, float], record: Mapping[str, Any], use: InUse
) -> Iterator[tuple[float, str]]:
    """Shares of a step that a setting might take away, each with its sentence."""
    sentences = {
        "data": _of_data,
        "communication": _of_communication,
        "idle": _of_idle,
        "optimizer": _of_optimizer,
        "dequantisation": _of_decoding,
        "attention": _of_attention,
        "element-wise": _of_elements,
    }
    if padding > USUAL["padding"] and not use.is_packed:
        yield padding - USUAL["padding"], _of_padding(padding, use)
    for name, sentence in sentences.items():
        above = shares[name] - USUAL[name]
        if above > 0 and (said := sentence(shares[name], use)):
            yield above, said
    if use.recomputes and _has_room(record["memory"]["of_timed_steps"]):
        yield (
            sum(shares[name] for name in RECOMPUTED) / 3,
            "Less than half of the GPU's memory was used, and a third of the arithmetic computes "
            "activations again: try model.gradient_checkpointing: false.",
        )


def _of_padding(share: float, use: InUse) -> str:
    return (
        f"{share:.0%} of what is computed is padding: set data.packing: true, or "
        "data.tokens_per_batch."
    )


def _of_data(share: float, use: InUse) -> str:
    if use.window is not None:
        more = "data.window: null reads and encodes all of them before training, and keeps them"
    elif use.num_workers:
        more = f"raise data.num_workers above {use.num_workers}"
    else:
        more = "set data.num_workers to 1 or more"
    return f"{share:.0%} of a step waits for rows: {more}."


def _of_communication(share: float, use: InUse) -> str:
    return (
        f"{share:.0%} of a step is communication: raise trainer.accumulate_grad_batches or the "
        "micro-batch, or use fewer devices."
    )


def _of_idle(share: float, use: InUse) -> str:
    waits = "the GPU waits for Python" if use.kind == "cuda" else "Python and waiting"
    return (
        f"{share:.0%} of a step is {waits}: give it larger micro-batches (data.batch_size or "
        "data.tokens_per_batch) and fewer of them a step."
    )


def _of_optimizer(share: float, use: InUse) -> str:
    changes = ["a lower model.lora.r", "more rows a step"]
    if use.optimizer != "adamw_torch":
        changes.insert(0, "model.optimizer.name: adamw_torch")
    return f"{share:.0%} of a step is the optimizer: take {_listed(changes)}."


def _of_decoding(share: float, use: InUse) -> str:
    return (
        f"{share:.0%} of a step decodes weights, which takes as long for one token as for a "
        "thousand: give it larger micro-batches."
    )


def _of_attention(share: float, use: InUse) -> str:
    changes = ["a shorter data.max_length"]
    if use.attention == "eager":
        changes.append("model.attn_implementation: sdpa")
    elif use.kind == "cuda" and use.attention != "flash_attention_2":
        changes.append("model.attn_implementation: flash_attention_2")
    return (
        f"{share:.0%} of a step is attention, which grows with the square of the rows' length: "
        f"take {_listed(changes)}."
    )


def _of_elements(share: float, use: InUse) -> str | None:
    changes = []
    if use.dropout:
        changes.append("model.lora.dropout: 0")
    if use.kind == "cuda" and use.dtype == "float32":
        changes.append("model.quantization.compute_dtype: bfloat16")
    if not changes:
        return None
    return f"{share:.0%} of a step is element-wise work: set {' and '.join(changes)}."


def _listed(changes: list[str]) -> str:
    *first, last = changes
    return f"{', '.join(first)}, or {last}" if first else last


def _has_room(peak: Mapping[str, int]) -> bool:
    whole = peak.get("card")
    return whole is not None and peak["reserved"] < ROOM * whole
