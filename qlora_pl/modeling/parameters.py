"""What a model's parameters are: how many, kept in what, which are trained, which are an adapter's.

A packed 4-bit matrix counts as the weights it stands for, not as its bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def logical_size(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for; packed 4-bit bytes count as what they hold."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


@dataclass(frozen=True)
class ParameterCounts:
    """How many weights a model has, by what they are kept in."""

    by_dtype: dict[str, int]
    """Logical weights by type, for example ``nf4``, ``bfloat16``, ``float32``."""
    trainable: int
    stored_bytes: int
    """Bytes of all parameters as they are stored, quantisation statistics included."""

    @property
    def total(self) -> int:
        """All logical weights."""
        return sum(self.by_dtype.values())


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count logical weights; a tied weight once."""
    by_dtype: Counter[str] = Counter()
    trainable = stored = 0
    for module in model.modules():
        if (scales := int8_scales(module)) is not None:
            stored += scales.numel() * scales.element_size()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = logical_size(parameter)
        by_dtype[str(parameter.dtype).split(".")[-1] if state is None else state.quant_type] += size
        stored += parameter.numel() * parameter.element_size()
        stored += 0 if state is None else statistics_bytes(state)
        trainable += size if parameter.requires_grad else 0
    return ParameterCounts(dict(by_dtype), trainable, stored)


def statistics_bytes(state: Any) -> int:
    """Bytes of what a packed 4-bit matrix is decoded with; ``state`` is its ``quant_state``."""
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def int8_scales(layer: nn.Module) -> Tensor | None:
    """``(out_features,)``, of an int8 layer, whose first forward moves them out of its weight."""
    weight = layer._parameters.get("weight")
    scales = getattr(weight, "SCB", None)
    if scales is None and weight is not None and weight.dtype == torch.int8:
        scales = layer.state.SCB  # type: ignore[union-attr]
    return scales


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_tensors(
    model: nn.Module, trained: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter as PEFT names and saves it, on the CPU.

    Args:
        model: The PEFT model.
        trained: Its trained tensors by the model's names, to take in place of the model's own,
            which are copied.
    """
    import peft  # slow to import

    # Left to itself PEFT looks the base's folder or Hub page up, in case its vocabulary has grown.
    tensors = peft.get_peft_model_state_dict(
        model, None if trained is None else dict(trained), save_embedding_layers=False
    )
    if trained is not None:
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
