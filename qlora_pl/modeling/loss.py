"""Causal language-model loss over trained tokens: a sum, with the weight to divide it by later.

The sum leaves normalisation to the whole optimizer step (all micro-batches, all devices). A mean
per micro-batch, averaged again by accumulation and again by devices, would give tokens of short
rows more weight and depend on how a step was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qlora_pl.batch import IGNORE_INDEX

Normalization = Literal["tokens", "rows", "micro_batches"]
CHUNK_TOKENS = 1024
"""Tokens whose float32 logits exist at a time (128k words x 1024 x 4 bytes = 0.5 GB)."""


class LossSum(NamedTuple):
    """What a batch adds to its step."""

    total: Tensor
    """Weighted sum of the token losses, float32 scalar with gradient."""
    weight: Tensor
    """What the step's total is divided by: tokens, rows or micro-batches; float32 scalar."""
    token_sum: Tensor
    """Plain sum of the token losses in nats, detached; for reporting."""
    num_tokens: Tensor
    """Trained tokens, int64 scalar."""


def causal_lm_loss(
    model: nn.Module, batch: Mapping[str, Any], normalize_by: Normalization = "tokens"
) -> LossSum:
    """Run the model and sum the loss of its trained tokens.

    Args:
        model: A transformers causal LM, with or without adapters.
        batch: See ``qlora_pl.batch.Batch``.
        normalize_by: ``tokens``: every trained token weighs the same. ``rows``: every row weighs
            the same. ``micro_batches``: every micro-batch does, as in the original.
    """
    labels = batch["labels"][:, 1:]  # the logits at position t predict token t + 1
    is_trained = labels != IGNORE_INDEX
    row, position = is_trained.nonzero(as_tuple=True)
    logits = trained_logits(model, batch["input_ids"], batch["attention_mask"], row, position)
    return sum_losses(token_losses(logits, labels[row, position]), row, is_trained, normalize_by)


def sum_losses(
    losses: Tensor, row: Tensor, is_trained: Tensor, normalize_by: Normalization
) -> LossSum:
    """Token losses -> what their batch adds to its step.

    Args:
        losses: ``(N,)`` float32.
        row: ``(N,)`` the row of each.
        is_trained: ``(B, T)`` bool, N of them true.
        normalize_by: See ``causal_lm_loss``.
    """
    tokens_in_row = is_trained.sum(dim=1)  # (B,)
    if normalize_by == "tokens":
        total, weight = losses.sum(), tokens_in_row.sum().float()
    elif normalize_by == "rows":
        total = (losses / tokens_in_row[row]).sum()
        weight = (tokens_in_row > 0).sum().float()
    else:
        num_tokens = tokens_in_row.sum()
        total, weight = losses.sum() / num_tokens.clamp(min=1), (num_tokens > 0).float()
    return LossSum(total, weight, losses.detach().sum(), tokens_in_row.sum())


def trained_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    row: Tensor,
    position: Tensor,
    **decoder_inputs: Tensor,
) -> Tensor:
    """Logits ``(N, V)`` of the given positions only, in the model's own arithmetic.

    The head is by far the widest layer; its input is cut down to the positions that are needed,
    inside the model's own forward, so that whatever a family does to its logits is kept.

    Args:
        model: A causal LM.
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``.
        row: ``(N,)`` rows of the wanted positions.
        position: ``(N,)`` positions within their rows; of an encoder-decoder model, its targets'.
        decoder_inputs: What the decoder of such a model reads.
    """
    with _head_input(model, row, position):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
            **decoder_inputs,
        )
    logits: Tensor = output.logits
    return logits[0]  # (1, N, V) -> (N, V)


@contextmanager
def _head_input(model: nn.Module, row: Tensor, position: Tensor) -> Iterator[None]:
    def pick(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = arguments  # (B, T, D)
        return (hidden[row, position].unsqueeze(0), *others)  # (1, N, D)

    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, ``(N,)`` float32.

    In float32 whatever the logits are: in bfloat16 the loss of a token over 32k words errs by about
    0.02 nats. The float32 copies are made chunk by chunk and again in the backward pass, never all.

    Args:
        logits: ``(N, V)``.
        labels: ``(N,)`` int64.
    """
    if len(labels) <= CHUNK_TOKENS:
        return _cross_entropy(logits, labels)
    chunks = zip(logits.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
    return torch.cat([checkpoint(_cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="none")
