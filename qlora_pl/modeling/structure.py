"""What each weight of a model is, told from its structure: linear, embedding, head, norm, router.

Quantisation and adapters both ask this question, and both must get the same answer: a head or a
router is never quantised or adapted by accident, and a matrix that nobody recognises is named, not
passed over. Structure rather than a list of families decides, so that the next family is no news.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

Role = Literal["linear", "embedding", "head", "norm", "router", "experts", "other"]

ROUTER_NAMES = ("gate", "router", "wg")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PROBE_SCALES = (1e-3, 1.0, 1e3)


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
    # By shape, since only some families make their routers linear modules. A shared expert's gate
    # has one output, and is as small and as sensitive.
    name = owner_name.rpartition(".")[2]
    if parameter.ndim != 2 or not num_experts:
        return False
    is_shared_gate = name.endswith("_gate") and parameter.shape[0] == 1
    return is_shared_gate or (name in ROUTER_NAMES and parameter.shape[0] in num_experts)


def _role(owner: nn.Module, owner_name: str, leaf: str, head: str | None, is_router: bool) -> Role:
    if owner_name == head:
        return "head"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if is_router:
        return "router"
    if is_linear(owner) and leaf == "weight":
        return "linear"
    is_fused = getattr(owner, leaf).ndim == 3 and not isinstance(owner, nn.modules.conv._ConvNd)
    return "experts" if is_fused else "other"


def is_plain_product(linear: nn.Module) -> bool:
    """Whether a linear module computes x W' + b and nothing else, so that it may be replaced.

    A subclass that does not override ``forward`` does; another is tried with weights and inputs of
    three sizes (a clamp or a soft cap shows at the largest). Falcon's is such a one, and is plain.
    """
    if type(linear).forward is nn.Linear.forward or type(linear).__name__ == "Conv1D":
        return True
    trial = copy.deepcopy(linear).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters():
            parameter.normal_(generator=generator)
        for scale in _PROBE_SCALES:
            x = scale * torch.randn(2, 3, trial.in_features, generator=generator)  # type: ignore
            try:
                got = trial(x)
            except Exception:  # it takes something else than one input
                return False
            expected = functional.linear(x, trial.weight, trial.bias)  # type: ignore[arg-type]
            tolerance = 1e-4 * expected.abs().max().item()
            if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
                return False
            if not torch.allclose(got, expected, rtol=0, atol=tolerance):
                return False
    return True


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
