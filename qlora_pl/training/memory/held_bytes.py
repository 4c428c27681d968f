"""Bytes of what a run holds on this device, counted on the tensors themselves, part by part.

Where a tensor is cut over devices, this device's part counts. A tied head counts once, and so do
the tables that the state of 8-bit optimizers shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.modeling.optimization.sharded_optimizer import local_shard
from qlora_pl.modeling.parameters import int8_scales, statistics_bytes

MODEL_PARTS = ("packed_weights", "constants", "embeddings_and_head", "norms_and_other", "adapters")
"""Components of a plan that a model holds from its loading on."""


def held_by_model(model: nn.Module) -> dict[str, int]:
    """Bytes of a model with what is trained, under the names that its plan has for them.

    Returns:
        ``packed_weights``: codes of four or eight bits. ``constants``: what they are decoded with.
        ``adapters``: what is trained beside a base. ``embeddings_and_head`` and
        ``norms_and_other``: the rest.
    """
    adapted: Any = model
    ends = [adapted.get_input_embeddings(), adapted.get_output_embeddings()]
    # Rows that are trained apart are a wrapper around the embedding.
    tensors = [tensor for end in ends if end is not None for tensor in end.parameters()]
    of_ends = {id(tensor) for tensor in tensors}
    has_adapters = hasattr(model, "peft_config")
    sizes: Counter[str] = Counter(dict.fromkeys(MODEL_PARTS, 0))
    for name, parameter in model.named_parameters():
        constants = _decoding_bytes(model.get_submodule(name.rpartition(".")[0]), parameter)
        if parameter.requires_grad and has_adapters:
            kind = "adapters"
        elif constants:
            kind = "packed_weights"
        else:
            kind = "embeddings_and_head" if id(parameter) in of_ends else "norms_and_other"
        sizes[kind] += size_of(parameter)
        sizes["constants"] += constants
    return dict(sizes)


def _decoding_bytes(layer: nn.Module, parameter: nn.Parameter) -> int:
    """Each matrix's own tables count, though matrices packed on a CPU share one of them."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return statistics_bytes(state)
    scales = int8_scales(layer) if parameter.dtype == torch.int8 else None
    return 0 if scales is None else size_of(scales)


def held_by_gradients(parameters: Iterable[Tensor]) -> int:
    """Bytes of the gradients that there are."""
    return sum(size_of(parameter.grad) for parameter in parameters if parameter.grad is not None)


def held_by_optimizer(optimizer: Any) -> tuple[int, int]:
    """Bytes of an optimizer's state: what is on its device, and what may move to the host."""
    held = getattr(optimizer, "_optimizer", optimizer)
    held = getattr(held, "inner", held)
    tensors = {
        value.data_ptr(): value
        for state in held.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel()
    }.values()
    paged = sum(size_of(tensor) for tensor in tensors if getattr(tensor, "is_paged", False))
    return sum(map(size_of, tensors)) - paged, paged


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor, or of this device's part of it."""
    local = local_shard(tensor)
    return local.numel() * local.element_size()
