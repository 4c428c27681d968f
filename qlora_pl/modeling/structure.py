"""What each weight of a model is, told from its structure: linear, embedding, head, norm, router.

Quantisation and adapters both ask this question, and both must get the same answer: a head is never
quantised or adapted by accident, and a matrix that nobody recognises is named, not passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

Role = Literal["linear", "embedding", "head", "norm", "router", "other"]

ROUTER_NAMES = ("gate", "router", "wg")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: any ``nn.Linear``, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def head_name(model: nn.Module) -> str | None:
    """The name of the module that makes logits, or None if the model has none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), None)


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Role]]:
    """Every parameter of two or more dimensions with its role; a tied one once.

    Args:
        model: A transformers model without adapters; may be on the meta device.
    """
    head = head_name(model)
    num_experts = {
        value for key in EXPERT_COUNTS if (value := getattr(model.config, key, None)) is not None
    }
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            owner_name, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            is_router = _is_router(owner_name, parameter, num_experts)
            yield name, parameter, _role(owner, owner_name, leaf, head, is_router)


def _is_router(owner_name: str, parameter: nn.Parameter, num_experts: set[Any]) -> bool:
    # By shape, since only some families make their routers linear modules.
    is_named_so = owner_name.rpartition(".")[2] in ROUTER_NAMES
    return is_named_so and parameter.ndim == 2 and parameter.shape[0] in num_experts


def _role(owner: nn.Module, owner_name: str, leaf: str, head: str | None, is_router: bool) -> Role:
    if owner_name == head:
        return "head"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if is_router:
        return "router"
    return "linear" if is_linear(owner) and leaf == "weight" else "other"


def linear_names(model: nn.Module) -> list[str]:
    """The modules that ``all-linear`` means: every linear but the head and routers."""
    return [name.rpartition(".")[0] for name, _, role in matrices(model) if role == "linear"]


def matches(name: str, listed: tuple[str, ...] | list[str]) -> bool:
    """Whether a module's name, or the end of it at a dot, is among those listed."""
    return any(name == entry or name.endswith(f".{entry}") for entry in listed)


def full_match(pattern: str, names: list[str]) -> list[str]:
    """The names that a regular expression matches from end to end."""
    compiled = re.compile(pattern)
    return [name for name in names if compiled.fullmatch(name)]
