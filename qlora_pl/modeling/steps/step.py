"""What an optimizer step was made of, and when it must not be taken.

Micro-batches are remembered as a few numbers on their device until the step ends; one exchange then
gives the sums over all of them and all devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_pl.batch import FILLER_ROW
from qlora_pl.errors import ConfigurationError, TrainingStoppedError
from qlora_pl.modeling.optimization.gradients import total_norm
from qlora_pl.modeling.steps.loss import LossSum


class StepSums(NamedTuple):
    """Sums over the micro-batches of a step and all devices."""

    weight: float
    """What the gradients are divided by: trained tokens (as often as they count), rows or
    micro-batches."""
    nats: float
    trained_tokens: float
    tokens: float
    padded_tokens: float
    token_pairs: float
    rows: float
    new_splits: float
    """Micro-batches that did not fit into memory and were split anew."""


class MicroBatch(NamedTuple):
    """What is remembered of a micro-batch until its step ends."""

    loss: LossSum
    lengths: Tensor
    """``(R,)`` tokens of each row."""
    num_pairs: Tensor
    """``(R,)`` squared lengths; see ``StepStatistics.num_token_pairs``."""
    row_ids: Tensor
    """``(R,)``."""
    num_padded_tokens: int

    @classmethod
    def of(cls, loss: LossSum, batch: Mapping[str, Any]) -> MicroBatch:
        """Without the graph, and without what the batch holds besides."""
        names = ("attention_mask", "decoder_attention_mask")
        masks = [batch[name] for name in names if name in batch]
        is_row = batch["row_ids"] != FILLER_ROW
        # Of the rows, or of the sources and of the targets; packed rows have no mask.
        sides = [mask.sum(dim=1) for mask in masks] or [batch["document_lengths"]]
        lengths = torch.stack(sides) * is_row
        # An encoder attends to all of its pairs, twice what is counted of a causal row.
        pairs = lengths.sum(dim=0).square() + lengths[:-1].square().sum(dim=0)
        detached = loss._replace(total=loss.total.detach())
        num_padded = sum(mask.numel() for mask in masks) or batch["input_ids"].numel()
        return cls(detached, lengths.sum(dim=0), pairs, batch["row_ids"], num_padded)

    def sums(self) -> Tensor:
        """``StepSums`` but its last, float64, on the device: nothing waits until the step ends."""
        lengths = self.lengths.double()
        parts = (
            self.loss.weight,
            self.loss.token_sum,
            self.loss.num_tokens,
            lengths.sum(),
            lengths.new_tensor(self.num_padded_tokens),
            self.num_pairs.sum(),
            (self.row_ids != FILLER_ROW).sum(),
        )
        return torch.stack([part.double() for part in parts])


@dataclass(frozen=True)
class StepStatistics:
    """What one optimizer step was made of, over all micro-batches and devices."""

    loss: float
    """Nats per trained token."""
    grad_norm: float
    """Norm of all gradients, before clipping."""
    learning_rate: float
    """Of the first parameter group, in this step."""
    num_trained_tokens: int
    num_tokens: int
    """Tokens without padding."""
    num_padded_tokens: int
    """Tokens with padding: what the model computed."""
    num_token_pairs: int
    """Sum of the squared row lengths, for counting the operations of attention; with an encoder
    those of source and target together, and of the source once more."""
    num_rows: int
    row_ids: tuple[int, ...]
    """This device's rows of the step."""
    loss_scale: float | None = None
    """What float16 training multiplies the loss by; None without a scaler."""

    @classmethod
    def of(
        cls,
        sums: StepSums,
        micro_batches: Sequence[MicroBatch],
        gradients: Sequence[Tensor],
        optimizer: Optimizer,
        precision: Any,
    ) -> StepStatistics:
        """What a step is about to do.

        Args:
            sums: Of all devices.
            micro_batches: Of this device.
            gradients: Of the step's mean.
            optimizer: What steps next.
            precision: Lightning's plugin, which may have a loss scaler.
        """
        scaler = getattr(precision, "scaler", None)
        return cls(
            loss=sums.nats / max(sums.trained_tokens, 1.0),
            grad_norm=total_norm(gradients),
            learning_rate=optimizer.param_groups[0]["lr"],
            num_trained_tokens=int(sums.trained_tokens),
            num_tokens=int(sums.tokens),
            num_padded_tokens=int(sums.padded_tokens),
            num_token_pairs=int(sums.token_pairs),
            num_rows=int(sums.rows),
            row_ids=tuple(row for batch in micro_batches for row in batch.row_ids.tolist()),
            loss_scale=None if scaler is None else scaler.get_scale(),
        )

    @property
    def is_skipped(self) -> bool:
        """Whether the loss scaler leaves this step out: a gradient overflowed float16."""
        return self.loss_scale is not None and not math.isfinite(self.grad_norm)

    def divergence(self) -> str | None:
        """One clause on why this step must not be taken, or None."""
        if self.num_trained_tokens and self.loss == 0.0:
            return "the loss is exactly 0"
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        if not math.isfinite(self.grad_norm) and not self.is_skipped:
            return f"the gradient's norm is {self.grad_norm}"
        return None


def sum_over_step(
    micro_batches: Sequence[MicroBatch],
    world_size: int,
    device: torch.device,
    num_new_splits: int = 0,
) -> StepSums:
    """Add up a step's micro-batches, and how many of them were split anew, on all devices."""
    sums = torch.zeros(len(StepSums._fields), dtype=torch.float64, device=device)
    for micro_batch in micro_batches:
        sums[:-1] += micro_batch.sums()
    sums[-1] = num_new_splits
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    return StepSums(*sums.tolist())


def refuse_other_sums(trainer: Any) -> None:
    """The strategy must add up a step's gradients over ranks, once, and not average them.

    Raises:
        ConfigurationError: if it is neither this project's, nor one process.
    """
    strategy = trainer.strategy
    if trainer.world_size > 1 and not getattr(strategy, "sums_gradients", False):
        raise ConfigurationError(
            f"trainer.strategy: a {type(strategy).__name__} wraps the model and adds gradients "
            "while a micro-batch may still be repeated; use those of qlora_pl.strategies, ddp or "
            "fsdp2."
        )


def refuse_unsettled(module: Any) -> None:
    """What is ``auto`` must have been settled before a model is loaded for training.

    Args:
        module: A ``QLoRAModule`` with its trainer.

    Raises:
        ConfigurationError: if the trainer has no callback that does so.
    """
    data, is_fit = getattr(module.trainer, "datamodule", None), module.trainer.state.fn == "fit"
    asked = {
        "data.batch_size": getattr(data, "asked_batch_size", None),
        "model.gradient_checkpointing": module.gradient_checkpointing,
    }
    if problems := [
        f"{key}: auto is settled by the callback AutoBatch, which this trainer has not; add it, or "
        "write a value."
        for key, value in asked.items()
        if is_fit and value == "auto"
    ]:
        raise ConfigurationError(problems)


def stop_if_diverged(
    step: StepStatistics, micro_batches: Sequence[MicroBatch], trainer: Any
) -> None:
    """A step whose loss or gradient is no number must not be taken.

    Raises:
        TrainingStoppedError: naming the rows, and the checkpoint to go back to.
    """
    if (problem := step.divergence()) is None:
        return
    row_ids = suspects(micro_batches)
    shown, more = row_ids[:8], len(row_ids) - 8
    data = getattr(trainer, "datamodule", None)
    rows = data.name_rows(shown) if data is not None else [f"row {row}" for row in shown]
    saved = getattr(trainer.checkpoint_callback, "last_checkpoint", None)
    raise TrainingStoppedError(
        f"Step {trainer.global_step + 1}: {problem}, with {', '.join(rows)}"
        f"{f' and {more} more' if more > 0 else ''}; nothing was updated, and the last good "
        f"checkpoint is {saved or 'none yet'}. Lower model.optimizer.lr, or look at these rows."
    )


def suspects(micro_batches: Sequence[MicroBatch]) -> list[int]:
    """Rows of the micro-batches whose loss is not finite, or of all where none stands out."""
    bad = [batch for batch in micro_batches if not batch.loss.token_sum.isfinite()]
    return [row for batch in bad or micro_batches for row in batch.row_ids.tolist()]


def refuse_silent_adapters(trained: Mapping[str, nn.Parameter]) -> None:
    """At the first step every B has a gradient, though every A has none yet.

    Raises:
        TrainingStoppedError: naming one that has not.
    """
    silent = [
        name
        for name, parameter in trained.items()
        if "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
    ]
    if silent:
        raise TrainingStoppedError(
            f"Step 1: {len(silent)} adapters received no gradient ('{silent[0]}' is one), so they "
            "would never learn; leave them out of model.lora.target_modules."
        )
