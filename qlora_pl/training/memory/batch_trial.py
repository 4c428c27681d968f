"""One forward and backward pass of the largest micro-batch, to see whether it fits into memory.

Nothing is changed by it: gradients are dropped and random states are put back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from qlora_pl.data.batches.largest_batch import largest_batch
from qlora_pl.modeling.base.encoder_decoder import language_model_loss
from qlora_pl.modeling.optimization.optimizers import optimizer_state_bytes
from qlora_pl.modeling.steps.micro_batches import back_propagate
from qlora_pl.modeling.steps.out_of_memory import free_memory, is_out_of_memory
from qlora_pl.training.checkpoints.random_state import collect_random_states, restore_random_states


class Trial(NamedTuple):
    """What came of it."""

    fits: bool
    peak_bytes: int | None
    """Of the device; None: it does not count them, or memory ran out."""


def try_batch(trainer: Any, module: Any, batch_size: int, num_micro_batches: int) -> Trial:
    """Run it, with as much memory taken as the rest of a step will take.

    Args:
        trainer: Of a fit, whose model is loaded and which has no optimizer yet.
        module: The ``QLoRAModule``.
        batch_size: Rows; with ``data.tokens_per_batch``, as many of the longest as that holds.
        num_micro_batches: Of a step on this device.
    """
    device, data = trainer.strategy.root_device, trainer.datamodule
    states = collect_random_states()
    if device.type == "cuda":
        free_memory()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        held = torch.empty(_others(module, num_micro_batches), dtype=torch.uint8, device=device)
        batch = trainer.strategy.batch_to_device(largest_batch(data, batch_size))
        with trainer.precision_plugin.train_step_context(), torch.enable_grad():
            loss = language_model_loss(module.model, batch, module.normalize_loss_by)
            back_propagate(loss.total, trainer.precision_plugin)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        del held, batch, loss
        fits = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits, peak = False, None
    for parameter in module.trained_tensors().values():
        parameter.grad = None
    free_memory()  # of a failed try; and a larger one's must not stand for the run's own peak
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    restore_random_states(states)
    return Trial(fits, peak)


def _others(module: Any, num_micro_batches: int) -> int:
    """Bytes of the optimizer's state, unless it can be in host memory, and of a step's gradients.

    From a step's second micro-batch on its gradients are made apart from those of the others.
    """
    trained, config = module.trained_tensors().values(), module.optimizer_config
    size = 0
    if not config.name.startswith("paged"):
        dtype = next(iter(trained)).dtype
        size += optimizer_state_bytes(config, [tuple(p.shape) for p in trained], dtype)
    if module.on_oom == "split" and num_micro_batches > 1:
        size += sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return size
