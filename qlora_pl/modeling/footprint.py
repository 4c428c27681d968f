"""What training takes of a device's memory, told from shapes: enough to choose a strategy by.

Weights, gradients and optimizer state are counted; activations are estimated, within some fifteen
per cent of published runs (7B to 70B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qlora_pl.modeling.adapters.lora import LoRAConfig, resolve_targets
from qlora_pl.modeling.base.names import by_module
from qlora_pl.modeling.base.quantization import QuantizationConfig, packed_bytes
from qlora_pl.modeling.base.quantization_plan import plan_quantization
from qlora_pl.modeling.base.structure import is_conv1d, linear_names
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig, optimizer_state_bytes
from qlora_pl.modeling.sharding import unit_names

HALF = 2
"""Bytes of a weight or an activation in 16 bits."""
OVERHEAD = 1.0e9
"""Bytes of the CUDA context and of what the allocator cannot use again."""
LOSS_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on one device."""

    weights: float
    """Of the frozen base, packed or not."""
    constants: float
    """What packed weights are decoded with, which stays whole where the base is cut."""
    units: float
    """What is whole at a time where the base is cut: a layer, the next one, and what lies outside
    of them or the larger of embedding and head."""
    trained: float
    """Adapters, their gradients and optimizer state."""
    activations: float

    @property
    def whole(self) -> float:
        """Where the device holds the whole base."""
        return self.weights + self.constants + self.trained + self.activations + OVERHEAD

    def shared(self, num_devices: int) -> float:
        """Where the base is cut over so many devices."""
        cut = (self.weights + self.trained) / num_devices
        return cut + self.units + self.constants + self.activations + OVERHEAD


def estimate_footprint(
    skeleton: nn.Module,
    quantization: QuantizationConfig,
    lora: LoRAConfig,
    optimizer: OptimizerConfig,
    num_tokens: int,
    recomputes: bool,
) -> Footprint:
    """Count and estimate from a model without weights.

    Args:
        skeleton: From ``build_skeleton``.
        quantization: How the base is stored.
        lora: What is trained.
        optimizer: What steps it.
        num_tokens: Of a micro-batch, padding included.
        recomputes: Whether activations are recomputed in the backward pass.
    """
    plan = plan_quantization(skeleton, quantization)
    stored = {}
    for name, parameter in skeleton.named_parameters():
        size = parameter.numel()
        is_packed = name in plan.quantized and quantization.is_quantized
        stored[name] = packed_bytes(size, quantization) if is_packed else HALF * float(size)
    bare = 0.5 if quantization.is_four_bits else 1.0
    constants = sum(
        stored[name] - bare * parameter.numel()
        for name, parameter in skeleton.named_parameters()
        if name in plan.quantized and quantization.is_quantized
    )
    units = unit_names(skeleton)
    of_units = {unit: _within(unit, stored) for unit in units}
    layers = {unit: size for unit, size in of_units.items() if unit[-1].isdigit()}
    ends = [size for unit, size in of_units.items() if unit not in layers]
    outside = sum(stored.values()) - sum(of_units.values())
    shapes = _adapter_shapes(skeleton, lora)
    trained_weights = sum(rows * columns for rows, columns in shapes)
    element = getattr(torch, lora.dtype).itemsize
    state = optimizer_state_bytes(optimizer, shapes, getattr(torch, lora.dtype))
    return Footprint(
        weights=sum(stored.values()) - constants,
        constants=constants,
        units=2 * max(layers.values()) + max(ends, default=0.0) + outside,
        trained=2 * element * trained_weights + state,
        activations=_activations(skeleton, list(layers), num_tokens, recomputes),
    )


def _within(unit: str, stored: dict[str, float]) -> float:
    return sum(size for name, size in stored.items() if name.startswith(f"{unit}."))


def _sides(skeleton: nn.Module, name: str) -> tuple[int, int]:
    """Inputs and outputs of a linear module."""
    module = skeleton.get_submodule(name)
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def _adapter_shapes(skeleton: nn.Module, lora: LoRAConfig) -> list[tuple[int, int]]:
    if not lora.has_adapters:
        return [(p.shape[0], p[0].numel()) for p in skeleton.parameters()]
    targets = resolve_targets(skeleton, lora)
    shapes = []
    for target, rank in by_module(lora.rank_pattern, targets, lora.r).items():
        inputs, outputs = _sides(skeleton, target)
        shapes += [(rank, inputs), (outputs, rank)]
    return shapes


def _activations(skeleton: nn.Module, units: list[str], num_tokens: int, recomputes: bool) -> float:
    """What the backward pass needs: inputs and outputs of every product, of one layer or of all."""
    linears = [name for name in linear_names(skeleton) if name.startswith(f"{units[0]}.")]
    of_layer = HALF * num_tokens * sum(sum(_sides(skeleton, name)) for name in linears)
    embedding = skeleton.get_input_embeddings().weight  # type: ignore[operator]
    vocabulary, width = embedding.shape
    logits = 3 * 4.0 * min(num_tokens, LOSS_TOKENS) * vocabulary
    if recomputes:
        return float(of_layer + HALF * num_tokens * width * len(units) + logits)
    return float(of_layer * len(units) + logits)
