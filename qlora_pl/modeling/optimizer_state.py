"""An optimizer's state by parameter name, for checkpoints, and back.

torch keys state by a running index, which moves when the strategy, the groups or a frozen layer do:
state would land on another parameter, silently. Names stay.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from qlora_pl.errors import CheckpointError
from qlora_pl.modeling.optimizers import NamedParameters

logger = logging.getLogger(__name__)

Stepped = dict[str, tuple[dict[str, Any], Tensor]]


def named_optimizer_state(
    optimizer: Optimizer, named_parameters: NamedParameters
) -> dict[str, Any]:
    """Key the optimizer's state by parameter name, for a checkpoint.

    Returns:
        ``{"state": {name: {key: tensor or number}}, "param_groups": [{..., "params": [names]}]}``,
        which ``torch.load(weights_only=True)`` reads. Its tensors are the optimizer's own, not
        copies. A parameter that never had a gradient has no state.

    Raises:
        CheckpointError: if the optimizer steps a parameter that has no name here.
    """
    stepped = _stepped(optimizer, named_parameters)
    return {
        "state": {
            name: {key: _plain(value) for key, value in optimizer.state[parameter].items()}
            for name, (_, parameter) in stepped.items()
            if optimizer.state.get(parameter)
        },
        "param_groups": [
            {key: _plain(value) for key, value in group.items()}
            | {"params": _names(stepped, group)}
            for group in optimizer.param_groups
        ],
    }


def optimizer_state_from_names(
    saved: dict[str, Any], optimizer: Optimizer, named_parameters: NamedParameters
) -> dict[str, Any]:
    """Give saved state in the form and order that ``optimizer.load_state_dict`` takes.

    Loading brings back the saved lr, betas and so on, too. torch's own optimizers go on training
    in the tensors of ``saved``, so it serves one load.

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
    if getattr(optimizer, "is_paged", False):
        # bitsandbytes #782: its load_state_dict moves all state to the parameter's device
        logger.warning("Optimizer state read from a checkpoint stays in GPU memory, unpaged.")
    position = {name: index for index, name in enumerate(stepped)}
    groups = [_names(stepped, group) for group in optimizer.param_groups]
    return {
        "state": {position[name]: dict(held) for name, held in saved["state"].items()},
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
    return problems


def _some(names: set[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + rest


def _plain(value: Any) -> Any:
    """The value as a type that ``torch.load(weights_only=True)`` reads."""
    if isinstance(value, Tensor):
        return value.detach()
    return value.item() if hasattr(value, "item") else value  # numpy's scalars are refused there
