"""One kind of parameter of a model: its name, sizes and role, and the layers that have it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Role = Literal["linear", "bias", "norm", "embedding", "head", "router", "experts", "other"]


@dataclass(frozen=True, kw_only=True)
class ParameterShape:
    """A parameter that occurs once, or once in each of several layers."""

    name: str
    """As transformers names it, with ``*`` for the number of the layer."""
    shape: tuple[int, ...]
    role: Role
    """``linear``: the matrix of a product, which is quantised and adapted; ``bias``: of one."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that have it; empty: it lies outside of them."""
    is_transposed: bool = False
    """Whether a matrix has its inputs first (GPT-2's ``Conv1D``)."""
    is_fragile: bool = False
    """Whether the family's authors keep it out of 16 bits, so that it is never quantised (T5's
    ``wo``)."""

    @property
    def count(self) -> int:
        """How often it occurs."""
        return max(1, len(self.layers))

    @property
    def size(self) -> int:
        """Weights of one."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """The last part of its module's name: ``q_proj``."""
        return self.module.rpartition(".")[2]

    @property
    def inputs(self) -> int:
        """Of a matrix."""
        return self.shape[0] if self.is_transposed else self.shape[-1]

    @property
    def outputs(self) -> int:
        """Of a matrix."""
        return self.shape[-1] if self.is_transposed else self.shape[0]

    def module_names(self) -> list[str]:
        """The module's name in each layer."""
        if not self.layers:
            return [self.module]
        return [self.module.replace("*", str(layer), 1) for layer in self.layers]


class ParameterList:
    """Parameters of a model in the making, in the model's order."""

    def __init__(self, num_layers: int) -> None:
        self.parameters: list[ParameterShape] = []
        self._layers = tuple(range(num_layers))

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        role: Role,
        *,
        layers: tuple[int, ...] | None = None,
        is_transposed: bool = False,
        is_fragile: bool = False,
    ) -> None:
        """Add one; ``layers`` None: in all of them if the name has a ``*``."""
        its = (self._layers if "*" in name else ()) if layers is None else layers
        self.parameters.append(
            ParameterShape(
                name=name,
                shape=shape,
                role=role,
                layers=its,
                is_transposed=is_transposed,
                is_fragile=is_fragile,
            )
        )

    def linear(
        self,
        module: str,
        inputs: int,
        outputs: int,
        *,
        has_bias: bool = False,
        is_transposed: bool = False,
        is_fragile: bool = False,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        """Add a product's matrix, and its bias."""
        self.add(
            f"{module}.weight",
            (inputs, outputs) if is_transposed else (outputs, inputs),
            "linear",
            layers=layers,
            is_transposed=is_transposed,
            is_fragile=is_fragile,
        )
        if has_bias:
            self.add(f"{module}.bias", (outputs,), "bias", layers=layers)

    def norm(
        self,
        module: str,
        size: int,
        *,
        has_bias: bool = False,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        """Add a norm's weight, and its bias."""
        self.add(f"{module}.weight", (size,), "norm", layers=layers)
        if has_bias:
            self.add(f"{module}.bias", (size,), "norm", layers=layers)
