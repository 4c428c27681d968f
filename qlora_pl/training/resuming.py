"""What a run compares and sets right before it trains on from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from qlora_pl.errors import CheckpointError, ConfigurationError, did_you_mean

logger = logging.getLogger(__name__)


def clipping(trainer: Trainer) -> dict[str, Any]:
    """What of the trainer's settings changes an update, in plain types."""
    algorithm = trainer.gradient_clip_algorithm
    return {
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": "norm" if algorithm is None else algorithm.value,
    }


def refuse_other_clipping(saved: Mapping[str, Any], trainer: Trainer) -> None:
    """A resumed run clips its gradients as it began.

    Raises:
        CheckpointError: naming each difference with both values.
    """
    now = clipping(trainer)
    problems = [
        f"The checkpoint was trained with trainer.{key}={saved[key]}, this run has {now[key]}. Use "
        "the checkpoint's value, or start without --ckpt_path."
        for key in now
        if saved[key] != now[key]
    ]
    if problems:
        raise CheckpointError(problems)


def take_up_schedules(trainer: Trainer) -> None:
    """Give the next step the learning rate of this run's schedule.

    A schedule's state holds the rate that it last computed, not its length: with more steps than
    the checkpoint's run had, that rate is of a curve that this run does not follow.
    """
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if not isinstance(schedule, LambdaLR):
            continue
        step = schedule.last_epoch
        rates = [
            base * factor(step)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        before = schedule.optimizer.param_groups[0]["lr"]
        if before != rates[0] and trainer.is_global_zero:
            logger.warning(
                f"The schedule's length changed with trainer.max_steps or max_epochs: step "
                f"{step + 1} trains at a learning rate of {rates[0]:.3g} instead of {before:.3g}."
            )
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates


def refuse_unknown_metric(monitor: str, trainer: Trainer) -> None:
    """A metric that the validation before training did not give is misspelt, or not a validation's.

    Raises:
        ConfigurationError: naming the ones that there are.
    """
    known = sorted(trainer.callback_metrics)
    if monitor.startswith("val/") and known:
        raise ConfigurationError(
            f"checkpoint.monitor: no metric is called '{monitor}' (there are {', '.join(known)})"
            f"{did_you_mean(monitor, known)}"
        )
    if monitor != "train/loss":
        logger.warning(
            f"checkpoint.monitor: the validation before training gave no '{monitor}' (but "
            f"{', '.join(known)}); unless a callback logs it later, no best checkpoint is kept."
        )
