"""How much arithmetic a step is, counted from the model's shapes.

The base is frozen, so its backward pass makes gradients of inputs only: 4 operations per weight and
token in all, not the 6 of full fine-tuning (and 6, not 8, with gradient checkpointing).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

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
    """Attention width summed over layers: heads x head size x layers."""

    def of_step(self, num_tokens: int, num_trained_tokens: int, num_token_pairs: int) -> float:
        """Operations of forward and backward, without what checkpointing computes twice.

        Args:
            num_tokens: Tokens of the step, without padding.
            num_trained_tokens: Those that pass the head.
            num_token_pairs: Sum of the squared row lengths; a causal row attends to half of them.
        """
        forward = 2 * num_tokens * (self.matrices + self.adapters) + self._attention(
            num_token_pairs
        )
        backward = 2 * num_tokens * (self.matrices + 2 * self.adapters)
        backward += 2 * self._attention(num_token_pairs)
        return float(forward + backward + 4 * num_trained_tokens * self.head)

    def _attention(self, num_token_pairs: int) -> int:
        return 2 * self.attention * num_token_pairs  # scores and sums, 2 each, of half the pairs


def compute_cost(model: nn.Module) -> ComputeCost:
    """Count a PEFT model's weights by what passes them."""
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    read = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = adapters = 0
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter is head or id(parameter) in read:
            continue  # rows that are read, and vectors: next to nothing beside a product
        if parameter.requires_grad:
            adapters += parameter.numel()
        else:
            matrices += logical_size(parameter)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_attention_heads", 0)  # RWKV and Mamba have no attention
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    return ComputeCost(
        matrices, head.numel(), adapters, heads * head_size * config.num_hidden_layers
    )
