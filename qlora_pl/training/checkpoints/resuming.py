"""What a run compares and sets right before it trains on from a checkpoint.

The checkpoint may be of a run on other devices: its counts of micro-batches are turned into those
that this run would have come to, and a device that the other run had not gets random states.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import Trainer, seed_everything
from torch.optim.lr_scheduler import LambdaLR

from qlora_pl.errors import CheckpointError, ConfigurationError, did_you_mean
from qlora_pl.training.checkpoints.random_state import collect_random_states
from qlora_pl.training.trainer_settings import micro_batches_of_epoch

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


def carry_over(checkpoint: dict[str, Any], position: int, trainer: Trainer) -> None:
    """Make a checkpoint of other devices or micro-batches one that this run could have written.

    Lightning counts micro-batches, within the epoch and over all, where everything else in a
    checkpoint counts optimizer steps. A checkpoint of the same layout is left as it is.

    Args:
        checkpoint: What Lightning is about to restore its loops from.
        position: The checkpoint's place in the epoch, in this run's micro-batches.
        trainer: Of this run.

    Raises:
        CheckpointError: if the loss depends on what differs.
    """
    saved = checkpoint["data"]
    now = trainer.datamodule.describe()  # type: ignore[attr-defined]
    if all(saved[name] == now[name] for name in ("batch_size", "accumulation")):
        return
    _refuse_other_means(saved["batch_size"], now["batch_size"], trainer)
    boundary = checkpoint["boundary"]
    if now["window"] is None:
        total = boundary["epoch"] * micro_batches_of_epoch(trainer) + position
    else:  # how many rows earlier windows kept is not known without encoding them
        total = boundary["step"] * now["accumulation"]
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for scope, count in (("total", total), ("current", position)):
        batches[scope].update(dict.fromkeys(("ready", "started", "processed", "completed"), count))
    if trainer.is_global_zero:
        logger.info(
            "The checkpoint's steps were cut into %d micro-batches of %d on each device, and go on "
            "as %d of %d on each of %d.",
            *(layout[name] for layout in (saved, now) for name in ("accumulation", "batch_size")),
            trainer.world_size,
        )
        if isinstance(trainer.val_check_interval, int):
            logger.warning(
                "trainer.val_check_interval: %d counts micro-batches, of which a step had %d and "
                "has %d now.",
                trainer.val_check_interval,
                saved["accumulation"],
                now["accumulation"],
            )


def _refuse_other_means(before: int, now: int, trainer: Trainer) -> None:
    """Where each micro-batch weighs the same, other micro-batches are another loss."""
    mean = getattr(trainer.lightning_module, "normalize_loss_by", "")
    if mean == "micro_batches" and before != now:
        raise CheckpointError(
            f"The checkpoint was trained with data.batch_size={before}, this run has {now}, and "
            "with model.normalize_loss_by: micro_batches the loss depends on it. Use the "
            "checkpoint's value, or start without --ckpt_path."
        )


def random_states_of(states: Sequence[dict[str, Any]], trainer: Trainer) -> dict[str, Any]:
    """The random states that this device goes on with.

    Its own where the checkpoint's run had a device of its rank. Otherwise those that follow from
    the seed, the rank and the step, so that no two devices, and no two resumes, draw alike.

    Args:
        states: Of each device of the checkpoint's run, by rank.
        trainer: Of this run.
    """
    rank, step = trainer.global_rank, trainer.global_step
    if rank < len(states):
        return states[rank]
    run_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    drawn = np.random.SeedSequence([run_seed, rank, step]).generate_state(1)
    seed_everything(int(drawn[0]), verbose=False)
    os.environ["PL_GLOBAL_SEED"] = str(run_seed)  # which that has changed
    return collect_random_states()


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
