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
    """Weighted sum of the token losses, scalar with gradient, of the token losses' type."""
    weight: Tensor
    """What the step's total is divided by: tokens, rows or micro-batches; scalar, same type."""
    token_sum: Tensor
    """Plain sum of the token losses in nats, detached; for reporting."""
    num_tokens: Tensor
    """Trained tokens, int64 scalar."""


def causal_lm_loss(
    model: nn.Module, batch: Mapping[str, Any], normalize_by: Normalization = "tokens"
) -> LossSum:
    """Run the model and sum the loss of its trained tokens.

    With ``loss_weights`` a token counts as often as its weight says, in the sum and in what it is
    divided by; the figures for reporting stay those of tokens, and one of weight 0 is not trained.

    Args:
        model: A transformers causal LM, with or without adapters.
        batch: See ``qlora_pl.batch.Batch``; padded or packed.
        normalize_by: ``tokens``: every trained token weighs the same. ``rows``: every row weighs
            the same. ``micro_batches``: every micro-batch does, as in the original.
    """
    labels = batch["labels"][:, 1:]  # the logits at position t predict token t + 1
    is_trained = labels != IGNORE_INDEX
    weights = batch.get("loss_weights")
    if weights is not None:
        weights = weights[:, 1:]
        is_trained &= weights > 0
    line, position = is_trained.nonzero(as_tuple=True)
    logits = trained_logits(
        model,
        batch["input_ids"],
        line,
        position,
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
    )
    losses = token_losses(logits, labels[line, position])  # (N,)
    row = _row_of_tokens(batch)[:, 1:][line, position]
    return sum_losses(
        losses, row, _at(weights, line, position), batch["input_ids"].numel(), normalize_by
    )


def _at(weights: Tensor | None, line: Tensor, position: Tensor) -> Tensor | None:
    return None if weights is None else weights[line, position]


def sum_losses(
    losses: Tensor,
    row: Tensor,
    weights: Tensor | None,
    max_rows: int,
    normalize_by: Normalization,
) -> LossSum:
    """Token losses -> what their batch adds to its step.

    Args:
        losses: ``(N,)``.
        row: ``(N,)`` the number of the row of each.
        weights: ``(N,)`` what each counts; None: 1.
        max_rows: Above every number of a row.
        normalize_by: See ``causal_lm_loss``.
    """
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    weighted, whole = losses * weights, weights.sum()
    if normalize_by == "tokens":
        total, weight = weighted.sum(), whole
    elif normalize_by == "rows":
        of_rows = whole.new_zeros(max_rows).index_add(0, row, weights)
        total, weight = (weighted / of_rows[row]).sum(), (of_rows > 0).sum().to(losses.dtype)
    else:
        is_empty = whole == 0
        total, weight = weighted.sum() / (whole + is_empty), (~is_empty).to(losses.dtype)
    return LossSum(total, weight, losses.detach().sum(), row.new_tensor(len(row)))


def trained_weight(batch: Mapping[str, Any]) -> Tensor:
    """What the trained tokens of a batch count together, as a float64 scalar.

    Args:
        batch: See ``qlora_pl.batch.Batch`` and ``Seq2SeqBatch``.
    """
    first = 0 if "decoder_attention_mask" in batch else 1  # a causal row's first is no label
    is_trained = batch["labels"][:, first:] != IGNORE_INDEX
    weights = batch.get("loss_weights")
    return (is_trained if weights is None else weights[:, first:] * is_trained).double().sum()


def _row_of_tokens(batch: Mapping[str, Any]) -> Tensor:
    """``(B, T)`` a number for each row of the batch, the same for all of its tokens."""
    ids = batch["input_ids"]
    if "position_ids" not in batch:
        return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    starts = (batch["position_ids"] == 0).flatten()
    return starts.cumsum(0).view_as(ids) - 1


def trained_logits(
    model: nn.Module,
    input_ids: Tensor,
    line: Tensor,
    position: Tensor,
    **inputs: Tensor | None,
) -> Tensor:
    """Logits ``(N, V)`` of the given positions only, in the model's own arithmetic.

    The head is by far the widest layer; its input is cut down to the positions that are needed,
    inside the model's own forward, so that whatever a family does to its logits is kept.

    Args:
        model: A transformers language model.
        input_ids: ``(B, T)``.
        line: ``(N,)`` lines of the wanted positions.
        position: ``(N,)`` positions within their lines; of an encoder-decoder model, its targets'.
        inputs: Whatever else the model reads; None is left out, since some families take no
            positions at all.
    """
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    with _head_input(model, line, position):
        output = model(input_ids=input_ids, use_cache=False, return_dict=True, **given)
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
    """Cross-entropy of each token in nats, ``(N,)`` float32; float64 of float64 logits.

    Of bfloat16 logits too, in which the loss of a token over 32k words would err by about 0.02
    nats. The float32 copies are made chunk by chunk and again in the backward pass, never all.

    Args:
        logits: ``(N, V)``.
        labels: ``(N,)`` int64.
    """
    if len(labels) <= CHUNK_TOKENS:
        return _cross_entropy(logits, labels)
    chunks = zip(logits.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
    return torch.cat([checkpoint(_cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(exact, labels, reduction="none")
