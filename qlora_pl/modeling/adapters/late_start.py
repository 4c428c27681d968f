"""Adapters over a base without weights, each of which begins where it would have over a full one.

PEFT draws all of them at once, then moves them to the base's device, where they are lost. Whole, a
65B's at rank 64 take 3.2 GB in every process; drawn layer by layer, no more than one layer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LateStarts:
    """Notes at which random state each layer's adapters would be drawn, and draws them from there.

    A state takes 5 kB, whatever the layer's size.
    """

    def __init__(self) -> None:
        self._draw: Any = None
        self._noted: dict[Any, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = {}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within the block PEFT's draws are noted; what they leave behind is theirs."""
        from peft.tuners.lora import LoraLayer

        draw = self._draw = LoraLayer.reset_lora_parameters

        def note_and_draw(layer: Any, *arguments: Any, **settings: Any) -> None:
            self._noted[layer] = (torch.get_rng_state(), arguments, settings)
            draw(layer, *arguments, **settings)

        LoraLayer.reset_lora_parameters = note_and_draw
        try:
            yield
        finally:
            LoraLayer.reset_lora_parameters = draw

    def draw(self, module: nn.Module) -> None:
        """Give a module's adapters their start on the CPU; those that have it are left alone.

        Args:
            module: The adapted model, or a part of it. The global generators are left as they were.
        """
        for layer in module.modules():
            if layer in self._noted:
                self._draw_layer(layer, *self._noted.pop(layer))

    def _draw_layer(
        self, layer: Any, state: Tensor, arguments: tuple[Any, ...], settings: dict[str, Any]
    ) -> None:
        lost = {name: p for name, p in layer.named_parameters() if "lora_" in name}
        for name, parameter in lost.items():
            _replace(layer, name, nn.Parameter(torch.empty(parameter.shape)))
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            self._draw(layer, *arguments, **settings)
        for name, parameter in lost.items():
            start = layer.get_parameter(name).detach().to(parameter.dtype)
            _replace(layer, name, nn.Parameter(start, requires_grad=parameter.requires_grad))


def _replace(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    layer.get_submodule(owner)._parameters[leaf] = parameter
