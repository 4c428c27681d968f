"""A model cut over devices along the first dimension of every parameter (torch's FSDP2).

A unit is what is whole on a device at a time: one decoder layer, the embedding or the head. Packed
4-bit matrices are cut as the bytes they are; what they are decoded with (0.016 bytes a weight with
double quantisation) stays whole beside each layer.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is cut over devices."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_shared(model: nn.Module) -> bool:
    """Whether devices hold parts of a model, and have to go through it together."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every device; of a sharded one all devices have to ask together."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = cast(Any, tensor).full_tensor()
    return full


def part_of(full: Tensor, sharded: Tensor) -> Tensor:
    """This device's part of a whole tensor, cut as another one is; may be empty.

    Args:
        full: Of the shape of ``sharded``.
        sharded: A tensor that is cut over devices, or one that is not, whose part is all.
    """
    if not is_sharded(sharded):
        return full
    cut = cast(Any, sharded)
    ((dimension, mesh),) = ((p.dim, cut.device_mesh) for p in cut.placements)
    rank, size = mesh.get_local_rank(), mesh.size()
    parts = full.chunk(size, dimension)  # fewer than size where rows are few, as FSDP2 cuts
    return parts[rank] if rank < len(parts) else full.narrow(dimension, 0, 0)


@torch.no_grad()
def copy_into(target: Tensor, full: Tensor) -> None:
    """Overwrite a tensor, sharded or not, by the values of a whole one."""
    if is_sharded(target):
        cast(Any, target).to_local().copy_(part_of(full, target))
    else:
        target.copy_(full)


def unit_names(model: nn.Module) -> list[str]:
    """What is cut apart: decoder layers (an encoder's too), and untied embedding and head.

    Args:
        model: A transformers model, with or without adapters.

    Raises:
        ConfigurationError: if the family does not say which of its modules are layers.
    """
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(getattr(base, "_no_split_modules", None) or ())
    names = [
        f"{parent}.{index}"
        for parent, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        for index, module in modules.named_children()
        if type(module).__name__ in kinds
    ]
    if not names:
        raise ConfigurationError(
            f"trainer.strategy: transformers does not say which modules of a {type(base).__name__} "
            "are its layers, so fsdp2 cannot cut it; take ddp."
        )
    layers = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return [*layers, *_ends(model)]


def _ends(model: nn.Module) -> list[str]:
    """Embedding and head, the widest matrices, where they are two; tied ones cannot be parted."""
    embedding = cast(Any, model).get_input_embeddings()
    head = cast(Any, model).get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return []
    return [name for name, module in model.named_modules() if module in (embedding, head)]


def shard(module: nn.Module, mesh: Any, offload: bool) -> None:
    """Cut a module's parameters over a mesh of devices; nested units are cut first.

    Args:
        module: With its weights, on this device.
        mesh: One-dimensional.
        offload: Whether the parts wait in host memory while they are not computed with.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    is_cuda = mesh.device_type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=is_cuda) if offload else OffloadPolicy()
    # Said of the root too: left whole after a validation, it would be saved by other objects.
    fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    # Sums, as under ddp: gloo of some versions adds where it is told to average (pytorch #162338).
    cut = cast(Any, module)
    cut.set_force_sum_reduction_for_comms(True)
    cut.set_gradient_divide_factor(1.0)
    for inner in module.modules():
        state = getattr(inner, "quant_state", None)
        weight = inner._parameters.get("weight")
        if state is not None and weight is not None:
            weight.quant_state = state  # type: ignore[attr-defined]  # for whoever counts weights
