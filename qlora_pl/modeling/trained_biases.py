"""Biases of the base that are trained: kept in float32 by layers that would round them.

bitsandbytes' layers replace a bias by a copy in the type of the products, and plain layers refuse
two types at once. In bfloat16 an update of 2e-4 is lost on any bias above 0.05.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError


def keep_trained_biases_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every trained bias its type, and its layer a forward that respects it.

    Raises:
        ConfigurationError: naming a layer whose kind is not known to be safe.
    """
    for name, module in model.named_modules():
        bias = module._parameters.get("bias")
        if bias is None or not bias.requires_grad or bias.dtype == dtype:
            continue
        bias.data = bias.data.to(dtype)
        if isinstance(module, nn.LayerNorm):
            module.__class__ = _wide_norm(type(module))  # type: ignore[arg-type]
            module.to(dtype)
        elif isinstance(module, nn.Linear):
            module.__class__ = _bias_keeping(type(module))  # type: ignore[arg-type]
        else:
            raise ConfigurationError(
                f"model.lora.bias: '{name}' is a {type(module).__name__}, whose bias cannot be "
                "trained in float32; use lora_only or none."
            )


@cache
def _bias_keeping(kind: type) -> type:
    """A linear layer, quantised or not, that adds its bias in the type of its output."""

    def forward(self: Any, x: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        self._parameters["bias"] = None
        try:
            out: Tensor = kind.forward(self, x)  # type: ignore[attr-defined]
        finally:
            self._parameters["bias"] = bias
        return out + bias.to(out.dtype)

    return type(f"BiasKeeping{kind.__name__}", (kind,), {"forward": forward})


@cache
def _wide_norm(kind: type) -> type:
    """A layer norm that computes in its own type and answers in its input's."""

    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = kind.forward(self, x.to(self.bias.dtype))  # type: ignore[attr-defined]
        return out.to(x.dtype)

    return type(f"Wide{kind.__name__}", (kind,), {"forward": forward})
