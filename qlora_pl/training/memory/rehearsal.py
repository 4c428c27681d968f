"""``Rehearsal``: the largest batches go through the model once before the first step.

Rows are of very different length, and one that does not fit into memory may come at hour twenty.
Nothing is changed by it: gradients are dropped, random states are put back, no metric is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_pl.data.batches.batching import TrainingBatches
from qlora_pl.modeling.base.encoder_decoder import language_model_loss
from qlora_pl.modeling.optimization.optimizers import optimizer_state_bytes
from qlora_pl.training.checkpoints.random_state import collect_random_states, restore_random_states


class Rehearsal(Callback):
    """Runs the largest training batch forward and backward, and scores the largest other one.

    A batch that does not fit is split here, on all ranks, as it would be in a step. On a CPU
    nothing is run: memory does not end there with an error that could be answered, but with a
    kill. The copy that a save makes needs no rehearsal: the first step is always saved.

    Args:
        on_cpu: Run on a CPU all the same.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        self.on_cpu = on_cpu
        self.num_tokens = 0
        """Of the training batch that was run, padding included."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run both, with as much memory taken as the optimizer's state will take."""
        device = trainer.strategy.root_device
        if device.type == "cpu" and not self.on_cpu:
            return
        states = collect_random_states()
        size = _missing_state_bytes(trainer, pl_module)
        held = torch.empty(size, dtype=torch.uint8, device=device)
        self._train(trainer, pl_module)
        self._score(trainer, pl_module)
        del held
        restore_random_states(states)

    def _train(self, trainer: Trainer, module: Any) -> None:
        batches = getattr(trainer.train_dataloader, "dataset", None)
        if not isinstance(batches, TrainingBatches):
            return
        batch = batches[batches.largest_key(trainer.current_epoch)]
        self.num_tokens = batch["input_ids"].numel()
        with trainer.precision_plugin.train_step_context(), torch.enable_grad():
            module.runner.add_gradients(module, trainer.strategy.batch_to_device(batch), number=1)
        for parameter in module.trained_tensors().values():
            parameter.grad = None
        own = torch.tensor(module.runner.num_new_splits, device=trainer.strategy.root_device)
        module.runner.agree(float(trainer.strategy.reduce(own, reduce_op="sum")), module)

    @staticmethod
    def _score(trainer: Trainer, module: Any) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        batches = getattr(data.val_dataloader(), "dataset", []) if trainer.enable_validation else []
        if not len(batches):
            return
        batch = trainer.strategy.batch_to_device(batches[0])  # longest rows come first
        with trainer.precision_plugin.val_step_context(), torch.no_grad():
            module.runner.evaluate(
                module, batch, lambda piece: language_model_loss(module.model, piece)
            )


def _missing_state_bytes(trainer: Trainer, module: Any) -> int:
    """What the optimizer will allocate in its first step, unless it can be in host memory."""
    config = module.optimizer_config
    if config.name.startswith("paged") or any(optimizer.state for optimizer in trainer.optimizers):
        return 0
    shapes = [tuple(p.shape) for p in module.trained_tensors().values()]
    is_shared = getattr(trainer.strategy, "shards_parameters", False)
    return optimizer_state_bytes(config, shapes, num_shards=trainer.world_size if is_shared else 1)
