"""What a ``QLoRAModule`` adds to a checkpoint, and what it refuses to continue from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from qlora_pl.errors import CheckpointError
from qlora_pl.modeling.compatibility import differences
from qlora_pl.modeling.optimization.optimizer_state import (
    named_optimizer_state,
    optimizer_state_from_names,
)
from qlora_pl.modeling.sharding import is_shared

RECORD = "qlora_pl"
"""What the run is."""
BASE = "frozen_base"
"""The checksum of the base that it was trained around."""
PIECES = "micro_batch_pieces"
"""How small micro-batches had to be cut."""


def add_to_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    """Add what the run is, and key the optimizer's state by parameter name; all ranks together."""
    checkpoint[BASE] = module.base_watch.state_dict(module.device)
    checkpoint[RECORD] = module.describe()
    checkpoint[PIECES] = module.runner.state_dict()
    if "optimizer_states" in checkpoint:
        named = list(module.trained_tensors().items())
        # Copies on the host, which the first process alone writes; all have to give their shards.
        is_needed = module.trainer.is_global_zero or is_shared(module.model)
        checkpoint["optimizer_states"] = [
            named_optimizer_state(_unwrap(optimizer), named)
            for optimizer in (module.trainer.optimizers if is_needed else [])
        ]


def refuse_other_run(module: Any, checkpoint: dict[str, Any]) -> None:
    """A checkpoint must be of the same base, adapter and optimizer.

    Raises:
        CheckpointError: naming each difference with both values.
    """
    if RECORD not in checkpoint:
        raise CheckpointError("The checkpoint was not written by qlora_pl; it holds no record.")
    is_training = module.trainer.state.fn == TrainerFn.FITTING
    if problems := list(differences(checkpoint[RECORD], module.describe(), is_training)):
        raise CheckpointError(problems)
    if BASE in checkpoint:
        module.base_watch.compare(checkpoint[BASE], module.device)


def key_by_index(module: Any, checkpoint: dict[str, Any], optimizer: Any) -> None:
    """Give the optimizer's state in a checkpoint the form in which Lightning hands it on.

    Raises:
        CheckpointError: if it belongs to other parameters.
    """
    named = list(module.trained_tensors().items())
    checkpoint["optimizer_states"] = [
        optimizer_state_from_names(state, _unwrap(optimizer), named)
        for state in checkpoint["optimizer_states"]
    ]


def _unwrap(optimizer: Any) -> Optimizer:
    inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner
