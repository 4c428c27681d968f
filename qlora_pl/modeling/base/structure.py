"""What each weight of a model is, told from its structure: linear, embedding, head, norm, router.

Quantisation and adapters both ask this question, and both must get the same answer: a head or a
router is never quantised or adapted by accident, and a matrix that nobody recognises is named, not
passed over. Structure rather than a list of families decides, so that the next family is no news.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

Role = Literal["linear", "embedding", "head", "norm", "router", "experts", "other"]

ROUTER_NAMES = ("gate", "router", "wg")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PROBE_SCALES = (1e-3, 1.0, 1e6)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: any ``nn.Linear``, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer with its matrix transposed."""
    from transformers.pytorch_utils import Conv1D  # slow to import

    return type(module) is Conv1D


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
    num_experts = _expert_counts(model.config)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            owner_name, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            if owner_name == head:
                role: Role = "head"
            elif _is_router(owner_name, parameter, num_experts):
                role = "router"
            elif parameter.ndim == 3 and parameter.shape[0] in num_experts:
                role = "experts"
            else:
                role = _role(owner, leaf)
            yield name, parameter, role


def _expert_counts(config: Any) -> set[int]:
    # Some families keep the settings of their mixtures in a configuration of its own (DBRX).
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
    counts = {getattr(part, key, None) for part in parts for key in EXPERT_COUNTS}
    return {count for count in counts if isinstance(count, int)}


def _is_router(owner_name: str, parameter: nn.Parameter, num_experts: set[int]) -> bool:
    # By shape, since only some families make their routers linear modules. A shared expert's gate
    # has one output, and is as small and as sensitive.
    if parameter.ndim != 2 or not num_experts:
        return False
    *parents, name = owner_name.split(".")
    is_shared_gate = name.endswith("_gate") and parameter.shape[0] == 1
    is_named = name in ROUTER_NAMES or "router" in parents
    return is_shared_gate or (is_named and parameter.shape[0] in num_experts)


def _role(owner: nn.Module, leaf: str) -> Role:
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    return "linear" if is_linear(owner) and leaf == "weight" else "other"


def is_plain_product(linear: nn.Module) -> bool:
    """Whether a linear module computes x W' + b and nothing else, so that it may be replaced.

    A subclass that does not override ``forward`` does; another is tried with weights and inputs of
    three sizes, in both modes (a clamp shows at the largest, beyond float16's range; dropout in
    training). Falcon's is such a one, and is plain.
    """
    if type(linear).forward is nn.Linear.forward or is_conv1d(linear):
        return True
    trial = copy.deepcopy(linear).to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for tensor in (*trial.parameters(), *trial.buffers()):
            tensor.normal_() if tensor.is_floating_point() else tensor.fill_(1)
        return all(
            _is_product_of(trial.train(mode), scale)
            for mode in (True, False)
            for scale in _PROBE_SCALES
        )


def _is_product_of(linear: Any, scale: float) -> bool:
    x = scale * torch.randn(2, 3, linear.in_features)
    try:
        got = linear(x)
    except Exception:  # it takes something else than one input
        return False
    expected = functional.linear(x, linear.weight, linear.bias)
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        return False
    return torch.allclose(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def linear_names(model: nn.Module) -> list[str]:
    """The modules that ``all-linear`` means: every linear but the head and routers."""
    return [name.rpartition(".")[0] for name, _, role in matrices(model) if role == "linear"]
