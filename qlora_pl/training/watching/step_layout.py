"""``StepLayout``: one line at the start that says what a step of this run is made of.

Processes, nodes, strategy, rows and tokens: with one look it is clear whether more GPUs have
changed the experiment.
"""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

logger = logging.getLogger(__name__)


class StepLayout(Callback):
    """Says it when weights and rows are there, before anything is scored or trained."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line, on rank 0."""
        if trainer.is_global_zero:
            logger.info("%s", layout_line(trainer))


def layout_line(trainer: Any) -> str:
    """What a step is made of, as the trainer and its data module have it.

    Args:
        trainer: After ``setup``; its data module is an ``InstructionDataModule``.
    """
    processes, nodes = trainer.world_size, trainer.num_nodes
    where = f"{processes} process{'es' * (processes != 1)}"
    if processes > 1:
        where += f" on {nodes} node{'s' * (nodes != 1)}"
    strategy = trainer.strategy
    name = "fsdp2" if getattr(strategy, "shards_parameters", False) else "ddp"
    shown = f"{name}, {strategy.root_device.type}" if processes > 1 else strategy.root_device.type
    return f"{where} ({shown}): {step_in_words(trainer)}"


def step_in_words(trainer: Any) -> str:
    """Rows of an optimizer step, the product they are, and its tokens where they are known."""
    data, accumulation = trainer.datamodule, trainer.accumulate_grad_batches
    micro_batches = accumulation * trainer.world_size
    if data.tokens_per_batch:
        factors = _product(
            (accumulation, "micro-batch", "es"), (trainer.world_size, "process", "es")
        )
        most = f"at most {micro_batches * data.tokens_per_batch:,} tokens"
        return f"an optimizer step is {factors}, {most} with padding"
    per_step = data.batch_size * micro_batches
    unit = "pack" if data.is_packed else "row"
    factors = _product(
        (data.batch_size, unit, "s"),
        (accumulation, "micro-batch", "es"),
        (trainer.world_size, "process", "es"),
    )
    if data.is_packed:
        tokens = f"at most {per_step * data.max_length:,} tokens"
    else:
        lengths = data.splits["train"].rows.lengths
        tokens = f"about {per_step * float(lengths.mean()):,.0f} tokens without padding"
    return f"an optimizer step is {per_step} {unit}{'s' * (per_step != 1)} = {factors}, {tokens}"


def _product(*factors: tuple[int, str, str]) -> str:
    return " x ".join(f"{n} {name}{ending * (n != 1)}" for n, name, ending in factors)
