"""Where a weight matrix stands in a model, told from its name: which layer, which kind of module.

Names say it in every family: the first number is the layer, and what follows it is the kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class ModulePlace(NamedTuple):
    """Where a module stands."""

    layer: str
    """``0``, or ``decoder 0`` where a model has two stacks, or empty outside of layers."""
    kind: str
    """``q_proj``, or ``attn.c_proj`` where the last part alone would mean two."""


def place_modules(names: Iterable[str]) -> dict[str, ModulePlace]:
    """The place of each module, layers in their order.

    Experts of a mixture share the place of their kind.
    """
    split = {name: _split(name) for name in names}
    stacks = {stack for stack, layer, _ in split.values() if layer}
    meanings: dict[str, set[str]] = {}
    for _, _, kind in split.values():
        meanings.setdefault(kind.rpartition(".")[2], set()).add(kind)
    places = {}
    for name, (stack, layer, kind) in split.items():
        last = kind.rpartition(".")[2]
        shown = last if len(meanings[last]) == 1 else kind
        whose = f"{stack.partition('.')[0]} " if len(stacks) > 1 and layer else ""
        places[name] = ModulePlace(f"{whose}{layer}", shown)
    return places


def in_order(name: str) -> list[tuple[int, str]]:
    """By which names are sorted as one counts: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _split(name: str) -> tuple[str, str, str]:
    """What comes before the layer's number, the number, and the kind without further numbers."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "", "", name
    rest = parts[number + 1 :]
    kind = [
        part
        for i, part in enumerate(rest)
        # T5 numbers the parts of a layer: "layer.0.SelfAttention.q"
        if not part.isdigit()
        and not (i + 1 < len(rest) and rest[i + 1].isdigit() and part == "layer")
    ]
    return ".".join(parts[:number]), parts[number], ".".join(kind) or name
