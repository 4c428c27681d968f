"""A frozen base laid over several devices, layer after layer, for answers and not for training.

Every layer computes where it lies, those on the CPU as well: bringing 4-bit weights to a GPU for
every token would take longer than multiplying them where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qlora_pl.errors import HardwareError
from qlora_pl.modeling.base.identity import BaseIdentity
from qlora_pl.modeling.base.quantization import (
    QuantizationConfig,
    packed_bytes,
    resolve_compute_dtype,
)
from qlora_pl.modeling.base.quantization_plan import QuantizationPlan
from qlora_pl.modeling.base.verification import account_for, refuse_broken_forward
from qlora_pl.modeling.loading.base_loading import (
    LoadedBase,
    bitsandbytes_config,
    keep_gradients_on_cpu,
    unquantized_dtype,
)
from qlora_pl.modeling.loading.copy_making import packed_copy
from qlora_pl.modeling.loading.packed_cache import read_packed
from qlora_pl.modeling.loading.packed_model import empty_model, fill, refuse_empty
from qlora_pl.modeling.loading.replacement import planned_replacement

Memory = Mapping[torch.device, int]
"""Bytes that weights may take on each device, in the order in which they are filled."""


def load_spread(
    identity: BaseIdentity,
    config: QuantizationConfig,
    plan: QuantizationPlan,
    *,
    memory: Memory,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedBase:
    """Load a base over several devices, from its packed copy, which is made if there is none.

    Args:
        identity: What to load.
        config: How it is quantised.
        plan: From ``make_plan``.
        memory: Which devices, and how much of each; inputs go to the first that holds anything.
        cache_dir: See ``cache_root``.
        trust_remote_code: Whether Python code in the model's folder may run.

    Raises:
        ConfigurationError: if a matrix is missing, or was not quantised as planned.
        HardwareError: if the devices do not hold the base, or there is no room for the copy.
    """
    first = next(iter(memory))
    compute_dtype = resolve_compute_dtype(config.compute_dtype, first)
    dtype = unquantized_dtype(config, compute_dtype)
    copy, is_made = packed_copy(
        identity, config, plan, first, cache_dir, trust_remote_code=trust_remote_code
    )
    packing = bitsandbytes_config(config, compute_dtype, plan) if config.is_quantized else None
    with planned_replacement(plan, config, compute_dtype):
        model: Any = empty_model(identity.folder, packing, dtype, None, trust_remote_code)
    places = lay_out(model, config, plan, memory)
    tensors = read_packed(copy)
    for name, device in places.items():
        fill(model, tensors, device, within=name)
    refuse_empty(model)
    account_for(model, plan, config)
    keep_gradients_on_cpu(model)
    model.requires_grad_(False)
    carry_inputs(model, places)
    refuse_broken_forward(model, compute_dtype, plan)
    source: Any = "quantised now" if is_made else "read from the cache"
    return LoadedBase(model, plan, compute_dtype, dtype, source)


def lay_out(
    model: Any, config: QuantizationConfig, plan: QuantizationPlan, memory: Memory
) -> dict[str, torch.device]:
    """Which part lies on which device: one device is filled, in the parts' order, then the next.

    So a model that fits on the first device lies there alone, and inputs travel as rarely as can
    be. Tied parameters lie where the first of them does.

    Args:
        model: Without weights.
        config: How it is quantised.
        plan: Which of its matrices are.
        memory: What there is.

    Raises:
        HardwareError: if that is not enough.
    """
    places: dict[str, torch.device] = {}
    lies_on: dict[int, torch.device] = {}
    devices = iter(memory)
    device, taken = next(devices), 0.0
    for name, part in parts(model):
        new = {n: p for n, p in part.named_parameters(name) if id(p) not in lies_on}
        if not new and (tied := next(part.parameters(), None)) is not None:
            places[name] = lies_on[id(tied)]
            continue
        size = sum(_size(n, parameter, config, plan) for n, parameter in new.items())
        while taken + size > memory[device]:
            following = next(devices, None)
            if following is None:
                raise HardwareError(_refusal(model, config, plan, memory))
            device, taken = following, 0.0
        taken += size
        places[name] = device
        lies_on |= dict.fromkeys(map(id, new.values()), device)
    return places


def parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """What stays whole, by name: decoder layers, and every other module with weights of its own."""
    kinds = set(model._no_split_modules or ())

    def within(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        children = list(module.named_children())
        owns = any(True for _ in module.parameters(recurse=False))
        if owns or not children or type(module).__name__ in kinds:
            yield name, module
            return
        for child_name, child in children:
            yield from within(f"{name}.{child_name}" if name else child_name, child)

    return within("", model)


def weight_bytes(model: nn.Module, config: QuantizationConfig, plan: QuantizationPlan) -> float:
    """Bytes of a model's weights, packed as planned."""
    return sum(_size(name, p, config, plan) for name, p in model.named_parameters())


def _size(
    name: str, parameter: nn.Parameter, config: QuantizationConfig, plan: QuantizationPlan
) -> float:
    if name in plan.quantized:  # an empty one may not have its shape
        return packed_bytes(torch.Size(plan.quantized[name]).numel(), config)
    return float(parameter.numel() * parameter.element_size())


def _refusal(
    model: nn.Module, config: QuantizationConfig, plan: QuantizationPlan, memory: Memory
) -> str:
    there = ", ".join(f"{device} with {size / 2**30:.3g} GiB" for device, size in memory.items())
    return (
        f"--max-memory: the weights take {weight_bytes(model, config, plan) / 2**30:.3g} GiB, in "
        f"whole layers, and {there} cannot hold them; allow more."
    )


def carry_inputs(model: Any, places: Mapping[str, torch.device]) -> None:
    """Have every module's inputs come to where its weights lie, and the output go back.

    Args:
        model: Filled.
        places: From ``lay_out``.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # slow to import

    if len(set(places.values())) == 1:
        return
    skipped = list(model._skip_keys_device_placement or [])
    for name, device in places.items():
        hook = AlignDevicesHook(execution_device=device, skip_keys=skipped)
        add_hook_to_module(model.get_submodule(name), hook)
    first = next(iter(places.values()))
    add_hook_to_module(
        model, AlignDevicesHook(execution_device=first, io_same_device=True, skip_keys=skipped)
    )
