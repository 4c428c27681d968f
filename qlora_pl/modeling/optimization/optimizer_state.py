"""An optimizer's state by parameter name, for checkpoints, and back.

torch keys state by a running index, which moves when the strategy, the groups or a frozen layer do:
state would land on another parameter, silently. Names stay, and whole tensors fit every layout: a
checkpoint moves between one process, DDP and FSDP2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qlora_pl.errors import CheckpointError
from qlora_pl.modeling.optimization.bitsandbytes_state import SettledState
from qlora_pl.modeling.optimization.optimizers import NamedParameters
from qlora_pl.modeling.optimization.sharded_optimizer import ShardedOptimizer
from qlora_pl.modeling.optimization.sharded_state import (
    PER_WEIGHT,
    Sharding,
    as_dtensor,
    part_of_device,
    whole_on_host,
)
from qlora_pl.modeling.optimization.state_precision import keeps_8bit_state

Stepped = dict[str, tuple[dict[str, Any], Tensor]]


def named_optimizer_state(
    optimizer: Optimizer, named_parameters: NamedParameters
) -> dict[str, Any]:
    """Copy the optimizer's state to the host, by parameter name, for a checkpoint.

    Over sharded parameters all devices must call it; tensors are gathered one at a time.

    Returns:
        ``{"state": {name: {key: tensor or number}}, "param_groups": [{..., "params": [names]}]}``,
        which ``torch.load(weights_only=True)`` reads. Tensors are whole and copies, so training may
        go on while they are written. A parameter that never had a gradient has no state. Over
        sharded parameters every device but the first gets an empty ``state``.

    Raises:
        CheckpointError: if the optimizer steps a parameter that has no name here.
    """
    stepped = _stepped(optimizer, named_parameters)
    state: dict[str, dict[str, Any]] = {}
    maps: dict[int, Tensor] = {}
    for name, (_, parameter) in stepped.items():
        sharding = Sharding.of(parameter)
        held = {
            key: _shared_map(value, maps)
            if key.startswith("qmap")
            else whole_on_host(key, value, sharding)
            for key, value in _held(optimizer, parameter).items()
        }
        if held and (sharding is None or sharding.rank == 0):
            state[name] = held
    return {
        "state": state,
        "param_groups": [
            {key: whole_on_host(key, value, None) for key, value in group.items()}
            | {"params": _names(stepped, group)}
            for group in optimizer.param_groups
        ],
    }


def optimizer_state_from_names(
    saved: dict[str, Any], optimizer: Optimizer, named_parameters: NamedParameters
) -> dict[str, Any]:
    """Give saved state in the form and order that ``optimizer.load_state_dict`` takes.

    Over sharded parameters that is this device's part of each tensor. Loading brings back the saved
    lr, betas and so on, too. torch's own optimizers go on training in the tensors of ``saved``
    where nothing is cut, so it serves one load.

    Args:
        saved: From ``named_optimizer_state``.
        optimizer: Built with the same settings over the same names, in any order.
        named_parameters: Those of the model that ``optimizer`` steps.

    Raises:
        CheckpointError: if names, groups, shapes or the kind of optimizer differ.
    """
    stepped = _stepped(optimizer, named_parameters)
    theirs = {name: group for group in saved["param_groups"] for name in group["params"]}
    if problems := _mismatches(stepped, theirs, saved["state"]):
        raise CheckpointError(problems)
    position = {name: index for index, name in enumerate(stepped)}
    groups = [_names(stepped, group) for group in optimizer.param_groups]
    return {
        "state": {
            position[name]: {
                key: _part(key, value, optimizer, stepped[name][1]) for key, value in held.items()
            }
            for name, held in saved["state"].items()
        },
        "param_groups": [
            {**theirs[names[0]], "params": [position[name] for name in names]} for names in groups
        ],
    }


def _stepped(optimizer: Optimizer, named_parameters: NamedParameters) -> Stepped:
    """Each stepped parameter's name -> (its group, itself), in the optimizer's order."""
    names = {id(parameter): name for name, parameter in named_parameters}
    pairs = [
        (group, parameter) for group in optimizer.param_groups for parameter in group["params"]
    ]
    if num_unnamed := sum(id(parameter) not in names for _, parameter in pairs):
        raise CheckpointError(
            f"The optimizer steps {num_unnamed} parameters that the model does not name; pass the "
            "named parameters that it was built over."
        )
    return {names[id(parameter)]: (group, parameter) for group, parameter in pairs}


def _held(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """This device's state of a parameter, in the optimizer's own tensors."""
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.local_state(parameter)
    if isinstance(optimizer, SettledState):
        optimizer.place_loaded_state()
    return optimizer.state.get(parameter, {})


def _shared_map(table: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """A copy on the host of what bytes mean, one for all parameters that share it."""
    if table.data_ptr() not in copies:
        copies[table.data_ptr()] = table.to("cpu", copy=True)
    return copies[table.data_ptr()]


def _part(key: str, value: Any, optimizer: Optimizer, parameter: Tensor) -> Any:
    """This device's part of saved state, as ``optimizer`` holds it."""
    part = part_of_device(key, value, parameter)
    if isinstance(optimizer, ShardedOptimizer) or not isinstance(parameter, DTensor):
        return part
    is_sharded = key in PER_WEIGHT and isinstance(part, Tensor)
    return as_dtensor(part, parameter) if is_sharded else part


def _names(stepped: Stepped, group: dict[str, Any]) -> list[str]:
    return [name for name, (own, _) in stepped.items() if own is group]


def _mismatches(stepped: Stepped, theirs: dict[str, dict], state: dict[str, dict]) -> list[str]:
    """One sentence for each way in which saved groups and state do not fit the optimizer."""
    missing, unused = stepped.keys() - theirs, theirs.keys() - stepped
    if missing or unused:
        return [
            f"Checkpoint {has} optimizer state for {_some(names)}. Train what the checkpoint "
            "trained, or start without --ckpt_path."
            for has, names in (("has no", missing), ("has unused", unused))
            if names
        ]
    problems = []
    for key, setting in (("kind", "name"), ("name", "lora_plus_ratio")):
        changed = {name for name in stepped if theirs[name].get(key) != stepped[name][0].get(key)}
        if changed:
            example = min(changed)
            problems.append(
                f"Checkpoint has {_some(changed)} in an optimizer group of {key} "
                f"{theirs[example].get(key)}, this run of {stepped[example][0].get(key)}. "
                f"Use the checkpoint's model.optimizer.{setting}."
            )
    for name, held in state.items():
        shape = tuple(stepped[name][1].shape)
        # keys of one value for each weight: bitsandbytes' kernels would read past a short tensor
        problems += [
            f"Checkpoint's optimizer state for {name} has shape {tuple(held[key].shape)}, the "
            f"parameter {shape}. Use the checkpoint's model.lora.r."
            for key in held.keys() & {"state1", "exp_avg", "momentum_buffer"}
            if tuple(held[key].shape) != shape
        ]
    return problems or _other_precision(stepped, state)


def _other_precision(stepped: Stepped, state: dict[str, dict]) -> list[str]:
    """Tensors whose saved state has 8 bits and would not be given them here, or the reverse."""
    problems = []
    for name, held in state.items():
        group, parameter = stepped[name]
        is_8bit = group["kind"].endswith("8bit") and keeps_8bit_state(parameter.shape)
        if "state1" in held and (held["state1"].dtype == torch.uint8) is not is_8bit:
            problems.append(
                f"Checkpoint's optimizer state for {name} has {8 * held['state1'].itemsize} bits, "
                f"where {8 if is_8bit else 32} are kept (docs/numerics.md); go on from its adapter "
                "with model.lora.init_from and a fresh optimizer."
            )
    return problems


def _some(names: set[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + rest
