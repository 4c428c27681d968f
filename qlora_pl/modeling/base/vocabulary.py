"""Tokens and embedding rows: whether every token has a row, and what happens when one has not.

A row that is added is random in every program that loads the adapter, unless it travels with it; so
a vocabulary grows only when asked to, and then the new rows, and they alone, are trained and saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.modeling.base.structure import head_name


def check_vocabulary(tokenizer: Any, skeleton: nn.Module, may_grow: bool) -> None:
    """Every token must have an embedding row, or be allowed to get one.

    Raises:
        ConfigurationError: if the tokenizer has more tokens than the base has rows.
    """
    rows = _embedding(skeleton).weight.shape[0]
    if len(tokenizer) > rows and not may_grow:
        raise ConfigurationError(
            f"data.tokenizer: '{tokenizer.name_or_path}' has {len(tokenizer)} tokens, the base has "
            f"{rows} embedding rows; use the base's own tokenizer, or set model.grow_vocabulary to "
            "train rows for the new tokens."
        )


def grow_vocabulary(model: Any, num_tokens: int) -> dict[str, list[int]]:
    """Add embedding rows for tokens that have none, each the mean of the rows there were.

    Args:
        model: A loaded base; embedding and head are never quantised.
        num_tokens: Of the tokenizer.

    Returns:
        The ids of the new rows by the name of the module that holds them: the embedding, and the
        head where it is not tied to it. Empty if every token had a row.

    Raises:
        ConfigurationError: if the head would not survive it.
    """
    rows = _embedding(model).weight.shape[0]
    if num_tokens <= rows:
        return {}
    holders = _holders(model)
    if len(holders) > 1 and model.config.tie_word_embeddings:  # T5 v1.1, Flan-T5, mT5
        raise ConfigurationError(
            f"model.grow_vocabulary: adding rows would tie this {type(model).__name__}'s own head "
            "to its embedding, whatever its checkpoint says; use the base's own tokenizer."
        )
    means = [_mean(module) for module in holders.values()]
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    holders = _holders(model)
    with torch.no_grad():
        for module, mean in zip(holders.values(), means, strict=True):
            module.weight[rows:] = mean
    model.requires_grad_(False)
    return {name: list(range(rows, num_tokens)) for name in holders}


def rows_of(model: Any, tokenizer: Any, tokens: Sequence[str]) -> dict[str, list[int]]:
    """The ids of these tokens by the name of each module that has rows for them.

    Raises:
        ConfigurationError: naming a token that the tokenizer does not have.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ConfigurationError(
                f"model.lora.trainable_tokens: '{token}' is no token of "
                f"'{tokenizer.name_or_path}'{did_you_mean(token, tokenizer.get_added_vocab())}"
            )
    ids = sorted({vocabulary[token] for token in tokens})
    return dict.fromkeys(_holders(model), ids) if ids else {}


def _embedding(model: Any) -> Any:
    return model.get_input_embeddings()


def _holders(model: Any) -> dict[str, Any]:
    """The embedding, and the head if it has rows of its own, by their names."""
    embedding, head = _embedding(model), model.get_output_embeddings()
    holders = {name: module for name, module in model.named_modules() if module is embedding}
    if head is not None and head.weight is not embedding.weight:
        holders[str(head_name(model))] = head
    return holders


def _mean(module: Any) -> torch.Tensor:
    mean: torch.Tensor = module.weight.detach().float().mean(dim=0)
    return mean.to(module.weight.dtype)
