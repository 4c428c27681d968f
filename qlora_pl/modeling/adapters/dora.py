"""DoRA's arithmetic over a packed base: the length of each row of W + BA apart from its direction.

Multiplied in bfloat16, PEFT's own layer rounds a row's length to eight bits, which makes the whole
row too long or too short by up to 0.4 %; and over int8 on a CPU it loses the base's scales at the
second forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class CastingMagnitude(nn.Module):
    """The lengths of rows, and what they add to an adapted layer (Liu et al. 2024, eq. 5).

    Takes the place of PEFT's ``DoraLinearLayer``, by class, so that its names and files are kept.
    """

    weight: nn.Parameter
    """``(out_features,)``."""
    fan_in_fan_out: bool
    """Whether the base's matrix lies transposed (GPT-2's ``Conv1D``)."""

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What is added to the base layer's output, ``(..., out_features)``.

        Args:
            x: ``(..., in_features)``, after dropout.
            lora_A: Multiplies in its input's type, as does ``lora_B``.
            lora_B: See ``lora_A``.
            scaling: alpha / r, or alpha / sqrt(r).
            base_layer: The frozen layer, packed or not.
            base_result: Its output for ``x`` without dropout; None if there was dropout.
            adapter_name: Not used.
        """
        weight = dequantized(base_layer)
        with torch.no_grad():  # section 4.3: the length of W + BA counts as a constant
            # Through the layers, as PEFT does: under FSDP their weights are whole only inside them.
            eye = torch.eye(self.rows(weight).shape[1], device=weight.device)
            length = self.get_weight_norm(weight, lora_B(lora_A(eye)).t(), scaling)
        scale = self.weight / length
        if base_result is None:
            base_result = functional.linear(x, self.rows(weight).to(x.dtype))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (scale - 1) * base_result + scale * lora_B(lora_A(x)) * scaling

    def get_weight_norm(self, weight: Tensor, lora_weight: Tensor, scaling: float) -> Tensor:
        """The length of each row of W + s BA, in float32 up to the last rounding, ``(out,)``."""
        merged = self.rows(weight) + scaling * lora_weight.float()
        return torch.linalg.vector_norm(merged, dim=1).to(self.weight.dtype)

    def rows(self, weight: Tensor) -> Tensor:
        """A matrix with a row an output, however the base has it."""
        return weight.t() if self.fan_in_fan_out else weight


def dequantized(layer: Any) -> Tensor:
    """The matrix of a layer as numbers; the layer is left as it is."""
    from peft.utils.integrations import dequantize_bnb_weight  # slow to import

    if type(layer.weight).__name__ not in ("Params4bit", "Int8Params"):
        weight: Tensor = layer.weight.detach()
        return weight
    weight = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))
    return weight


def keep_magnitude_in(layer: Any, magnitude: Any, dtype: torch.dtype) -> None:
    """Give a layer's fresh lengths their type and this project's arithmetic.

    Args:
        layer: PEFT's layer around the frozen one; its B is zero.
        magnitude: Its ``DoraLinearLayer``.
        dtype: What the lengths are kept in.
    """
    base = layer.get_base_layer()
    if getattr(base.weight, "SCB", True) is None:
        base.weight.SCB = base.state.SCB  # on a CPU, PEFT has replaced the weight without them
    weight = dequantized(base)
    magnitude.__class__ = CastingMagnitude
    magnitude.weight.data = magnitude.weight.data.to(dtype)
    nothing = torch.zeros(1, 1, device=weight.device)
    magnitude.weight.data = magnitude.get_weight_norm(weight, nothing, 0.0)
