"""What decides which rows form which step, kept in every checkpoint and compared on resuming.

A step's rows depend on its global batch, not on the devices and micro-batches that it is cut into.
So a run goes on with others, from the same point between two steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np

from qlora_pl.data.batches.batching import BatchLayout
from qlora_pl.errors import CheckpointError

SENTENCES = {
    "train_rows": "the training rows (or their template, tokenizer or length)",
    "num_train_rows": "the number of training rows",
    "window": "data.window",
    "global_batch_size": "the batch of an optimizer step (data.global_batch_size)",
    "group_by_length": "data.group_by_length",
    "seed": "the seed of the order of rows",
    "pack_tokens": "the tokens of a pack (data.packing and data.max_length)",
    "tokens_per_batch": "data.tokens_per_batch",
    "multiplicity": "the weights of the sources",
}
"""Each part of the record in words; what a record lacks is None, as where it is not used."""


def describe_order(
    data: Any, rows: str, layout: BatchLayout, seed: int, multiplicity: np.ndarray | None
) -> dict[str, Any]:
    """The record, in plain types.

    Args:
        data: An ``InstructionDataModule``.
        rows: Fingerprint of the training rows.
        layout: How a step is cut; kept for ``position_in_layout`` alone.
        seed: Of the order of rows.
        multiplicity: How often an epoch uses each row; None: once.
    """
    return {
        "train_rows": rows,
        "num_train_rows": None if data.window else len(data.splits["train"].rows),
        "window": data.window,
        "global_batch_size": layout.global_batch_size,
        "batch_size": layout.batch_size,
        "accumulation": layout.accumulation,
        "group_by_length": data.group_by_length,
        "seed": seed,
        "pack_tokens": data.max_length if data.is_packed else None,
        "tokens_per_batch": data.tokens_per_batch,
        "multiplicity": None if multiplicity is None else _digest_of(multiplicity),
    }


def position_in_layout(saved: Mapping[str, Any], now: Mapping[str, Any], position: int) -> int:
    """Where a run of the same rows and order is at the same step.

    Args:
        saved: What the checkpoint's run recorded.
        now: The same of this run.
        position: Micro-batches of the epoch that each device of the checkpoint's run had done; on
            one device eight of them may be two steps, and on four devices eight.

    Returns:
        Micro-batches of the epoch that each device of this run would have done.

    Raises:
        CheckpointError: if rows or order are others.
    """
    refuse_other_order(saved, now)
    if saved["accumulation"] == now["accumulation"]:
        return position
    steps, rest = divmod(position, saved["accumulation"])
    if rest:
        raise CheckpointError(
            f"The checkpoint lies {rest} micro-batches into a step of {saved['accumulation']}, so "
            "only a run with its trainer.accumulate_grad_batches can go on from it."
        )
    return steps * int(now["accumulation"])


def _digest_of(values: np.ndarray) -> str:
    """SHA-256 of numbers."""
    return sha256(np.ascontiguousarray(values, dtype=np.float64).tobytes()).hexdigest()


def refuse_other_order(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """The rows and their order must be those of the run that wrote a checkpoint.

    Args:
        saved: What the checkpoint's run recorded.
        now: The same of this run.

    Raises:
        CheckpointError: naming each difference with both values.
    """
    problems = [
        f"The checkpoint's run differs in {words}: it had {_short(saved.get(name))}, "
        f"this run has {_short(now.get(name))}. Use its value, or start without --ckpt_path."
        for name, words in SENTENCES.items()
        if saved.get(name) != now.get(name)
    ]
    if problems:
        raise CheckpointError(problems)


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else str(value)
