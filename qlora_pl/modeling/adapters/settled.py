"""Adapters of a model that only answers: the same products, with less around each of them.

A token of an answer takes hundreds of small products, beside which PEFT's checks, copies and casts
weigh: a seventh of the time of a small model on a CPU, and more launches than products on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_pl.modeling.adapters.lora import CastingLinear


class SettlingLinear(CastingLinear):
    """A linear layer that is cast once, at its first product, instead of at each.

    Products have the same bytes, since a layer's inputs are all of one type. Only those of a single
    token on a CPU are taken in float32 and rounded afterwards, which sums the same numbers in
    another order: a product in bfloat16 has a fixed cost there that is twice as large as this one.
    """

    _wide: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``, in the type of the input."""
        if self.weight.dtype != input.dtype:
            self.to(input.dtype)
        is_single = input.numel() == self.in_features and self.bias is None
        if is_single and input.dtype == torch.bfloat16 and input.device.type == "cpu":
            if self._wide is None:
                self._wide = self.weight.float()
            return functional.linear(input.float(), self._wide).to(input.dtype)
        return super().forward(input)


class _SettledLayer:
    """What a PEFT layer becomes: one plain adapter's path, and PEFT's own for all others."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, in the same order and types, where one adapter without a variant is active."""
        name = self._active_adapter if isinstance(self._active_adapter, str) else None
        if name is None and len(self._active_adapter) == 1:
            (name,) = self._active_adapter
        is_plain = not (args or kwargs or self._disable_adapters or self.merged_adapters)
        if not is_plain or name not in self.lora_A or name in self.lora_variant or self.training:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        down, up = self.lora_A[name], self.lora_B[name]
        result: Tensor = self.base_layer(x)
        change: Tensor = up.forward(down.forward(x)) * self.scaling[name]
        return result + change.to(result.dtype)


@functools.cache
def _settled(kind: type) -> type:
    return type(f"Settled{kind.__name__}", (_SettledLayer, kind), {})


def settle_adapters(model: nn.Module) -> None:
    """Let adapters take the type they multiply in, for good: nobody trains or saves them then."""
    from peft.tuners import lora  # slow to import

    kinds = {getattr(lora, name, None) for name in ("Linear", "Linear4bit", "Linear8bitLt")}
    for module in list(model.modules()):
        if type(module) is CastingLinear:
            module.__class__ = SettlingLinear
        elif type(module) in kinds:
            module.__class__ = _settled(type(module))
