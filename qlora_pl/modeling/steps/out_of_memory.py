"""Running out of memory: which errors mean it, what frees some, and what a user is told."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # the same on Windows
    "CUDA error: out of memory",  # outside torch's own allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What is said by libraries that have no error class for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might not have failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def free_memory() -> None:
    """Give back what a failed try held."""
    gc.collect()  # a graph with cycles outlives its last reference
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Split(NamedTuple):
    """A micro-batch that was repeated in more pieces."""

    rank: int
    step: int
    """From 1, as all numbers of steps."""
    micro_batch: int
    """Of the step on its rank, from 1."""
    num_rows: int
    num_tokens: int
    """Padding included."""
    before: int
    """Pieces of the try that failed."""
    after: int
    """Pieces of the one that did not."""


def num_tokens(batch: Mapping[str, Any]) -> int:
    """Of all lines of a batch, padding and targets included."""
    sides = ("input_ids", "labels") if "decoder_attention_mask" in batch else ("input_ids",)
    return sum(batch[side].numel() for side in sides)


def describe_split(split: Split, module: Any, agreed: int) -> str:
    """What happened, as a sentence for the log; ``agreed`` is how all ranks go on."""
    redrawn = (
        "; the dropout masks of this micro-batch were redrawn" if module.lora.dropout > 0 else ""
    )
    return (
        f"Step {split.step}, micro-batch {split.micro_batch} of rank {split.rank} "
        f"({split.num_rows} rows, {split.num_tokens} tokens) ran out of memory in {split.before} "
        f"piece{'s' * (split.before > 1)} and was repeated in {split.after}, with the same "
        f"gradient{redrawn}. From the next step on every micro-batch goes through the model in "
        f"{agreed} pieces; a smaller data.batch_size with more trainer.accumulate_grad_batches "
        "would do so from the start."
    )


def _place(module: Any) -> str:
    trainer = module.trainer
    place = f"Step {trainer.global_step + 1}" if trainer.training else "While evaluating"
    return place + (f" on rank {module.global_rank}" if trainer.world_size > 1 else "")


def row_too_large(module: Any, batch: Mapping[str, Any]) -> str:
    """Why the run ends where pieces are single rows already; names the longest."""
    masks = [batch[name] for name in ("attention_mask", "decoder_attention_mask") if name in batch]
    lengths = [mask.sum(dim=1) for mask in masks] or [batch["document_lengths"]]
    longest = int(torch.stack(lengths).sum(dim=0).argmax())
    row, size = int(batch["row_ids"][longest]), int(sum(side[longest] for side in lengths))
    data = getattr(module.trainer, "datamodule", None)
    named = data.name_rows([row]) if data is not None and module.trainer.training else []
    return (
        f"{_place(module)}: out of memory with a single row, which cannot be split "
        f"({named[0] if named else f'row {row}'}, {size} tokens); lower data.max_length, "
        "turn model.gradient_checkpointing on, or take a smaller base."
    )


def batch_too_large(module: Any, batch: Mapping[str, Any]) -> str:
    """Why the run ends where a batch may not be split; names what to set instead."""
    trainer, data = module.trainer, getattr(module.trainer, "datamodule", None)
    is_shared = getattr(trainer.strategy, "shards_parameters", False)
    reason = "ranks that share a model cannot repeat it" if is_shared else "model.on_oom is stop"
    lines = len(batch["input_ids"])
    advice = f"data.batch_size: {max(1, lines // 2)}"
    if not trainer.training:
        advice = f"data.eval_batch_size: {max(1, lines // 2)}"
    elif tokens := getattr(data, "tokens_per_batch", None):
        advice = f"data.tokens_per_batch: {tokens // 2}"
    elif lines == 1:
        advice = "a smaller data.max_length"
    return (
        f"{_place(module)}: out of memory with a batch of {lines} lines and {num_tokens(batch)} "
        f"tokens, and {reason}; set {advice}, and continue with --ckpt_path last."
    )
