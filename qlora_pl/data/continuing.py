"""What decides which rows form which step, kept in every checkpoint and compared on resuming."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np

from qlora_pl.errors import CheckpointError

SENTENCES = {
    "train_rows": "the training rows (or their template, tokenizer or length)",
    "num_train_rows": "the number of training rows",
    "window": "data.window",
    "global_batch_size": "the rows of an optimizer step",
    "batch_size": "data.batch_size",
    "accumulation": "trainer.accumulate_grad_batches",
    "group_by_length": "data.group_by_length",
    "seed": "the seed of the order of rows",
    "pack_tokens": "the tokens of a pack (data.packing and data.max_length)",
    "tokens_per_batch": "data.tokens_per_batch",
    "multiplicity": "the weights of the sources",
}
"""Each part of the record in words; what a record lacks is None, as where it is not used."""


def digest_of(values: np.ndarray) -> str:
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
