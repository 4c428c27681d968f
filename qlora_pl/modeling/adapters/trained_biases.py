"""Biases of the base that are trained: kept in float32, and added in the type of the products.

In bfloat16 an update of 2e-4 is lost on any bias above 0.06. bitsandbytes' layers cast a bias in
place whatever it is kept in, and plain layers refuse two types at once; so for the time of a
forward each layer sees a copy of its bias in the type that it had.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.structure import is_linear


def keep_trained_biases_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every trained bias its type, and its layer a forward that respects it.

    Raises:
        ConfigurationError: naming a layer whose kind is not known to be safe.
    """
    for name, module in model.named_modules():
        bias = module._parameters.get("bias")
        if bias is None or not bias.requires_grad:
            continue
        if not is_linear(module) and not isinstance(module, nn.LayerNorm):
            if bias.dtype == dtype:
                continue
            raise ConfigurationError(
                f"model.lora.bias: '{name}' is a {type(module).__name__}, whose bias cannot be "
                "trained in float32; use lora_only or none."
            )
        bias.data = bias.data.to(dtype)
        module.__class__ = _bias_casting(type(module))  # type: ignore[arg-type]


@cache
def _bias_casting(kind: type) -> type:
    """The same layer, quantised or not, over a copy of its bias in the type of what it adds to."""
    is_norm = issubclass(kind, nn.LayerNorm)

    def forward(self: Any, x: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        added_to = self.weight.dtype if is_norm else getattr(self, "compute_dtype", None) or x.dtype
        self._parameters["bias"] = bias.to(added_to)
        try:
            out: Tensor = kind.forward(self, x)  # type: ignore[attr-defined]
        finally:
            self._parameters["bias"] = bias
        return out

    return type(f"BiasCasting{kind.__name__}", (kind,), {"forward": forward})
