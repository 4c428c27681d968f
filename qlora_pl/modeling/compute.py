"""How much arithmetic a step is, counted from the model's shapes.

The base is frozen, so its backward pass makes gradients of inputs only: 4 operations per weight and
token in all, not the 6 of full fine-tuning (and 6, not 8, with gradient checkpointing).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_pl.modeling.base.encoder_decoder import is_encoder_decoder
from qlora_pl.modeling.evaluation_mode import evaluation_mode
from qlora_pl.modeling.parameters import logical_size


@dataclass(frozen=True)
class ComputeCost:
    """Floating-point operations of a model's parts, a multiplication and an addition as two."""

    matrices: int
    """Weights of the frozen matrices that every token passes."""
    head: int
    """Weights of the output head, which only trained tokens pass."""
    adapters: int
    """Trained weights of matrices."""
    attention: int
    """Attention width summed over layers: heads x head size x layers (of the encoder, if any)."""
    target_matrices: int = 0
    """Weights of frozen matrices that only an encoder-decoder model's target tokens pass, beside
    ``matrices``, which then only its source tokens pass."""
    target_adapters: int = 0
    """Likewise of trained ones."""

    def of_step(self, num_tokens: int, num_trained_tokens: int, num_token_pairs: int) -> float:
        """Operations of forward and backward, without what checkpointing computes twice.

        Args:
            num_tokens: Tokens of the step, without padding.
            num_trained_tokens: Those that pass the head; with an encoder, all of the targets.
            num_token_pairs: As in ``StepStatistics``; a causal row attends to half of its own.
        """
        has_encoder = self.target_matrices > 0
        num_read = num_tokens - num_trained_tokens if has_encoder else num_tokens
        products = num_read * (4 * self.matrices + 6 * self.adapters)
        products += num_trained_tokens * (4 * self.target_matrices + 6 * self.target_adapters)
        attention = 3 * self._attention(num_token_pairs)
        return float(products + attention + 4 * num_trained_tokens * self.head)

    def _attention(self, num_token_pairs: int) -> int:
        return 2 * self.attention * num_token_pairs  # scores and sums, 2 each, of half the pairs


def compute_cost(model: nn.Module) -> ComputeCost:
    """Count a PEFT model's weights by what passes them."""
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    read = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    of_target = _target_parameters(model) if is_encoder_decoder(model) else set()
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter is head or id(parameter) in read:
            continue  # rows that are read, and vectors: next to nothing beside a product
        kind = "adapters" if parameter.requires_grad else "matrices"
        sizes[f"target_{kind}" if id(parameter) in of_target else kind] += logical_size(parameter)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_attention_heads", 0)  # RWKV and Mamba have no attention
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    attention = heads * head_size * config.num_hidden_layers
    return ComputeCost(
        sizes["matrices"],
        head.numel(),
        sizes["adapters"],
        attention,
        sizes["target_matrices"],
        sizes["target_adapters"],
    )


def _target_parameters(model: nn.Module) -> set[int]:
    """Matrices of an encoder-decoder model that multiply target tokens.

    Seen in a forward over a source of one token and a target of two: a decoder also multiplies
    what the encoder has made of the source.
    """
    found: set[int] = set()

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and arguments[0].shape[-2] == 2:
            found.update(id(parameter) for parameter in module.parameters(recurse=False))

    owners = {
        module
        for module in model.modules()
        if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
        and not isinstance(module, nn.Embedding)
    }
    handles = [module.register_forward_pre_hook(look) for module in owners]
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with evaluation_mode(model), torch.no_grad():
            model(input_ids=ids[:, :1], decoder_input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
