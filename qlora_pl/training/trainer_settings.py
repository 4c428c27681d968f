"""Which of Lightning's trainer settings a run may have; the others belong to other keys."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from qlora_pl.data.batches.global_batch import AUTO
from qlora_pl.errors import ConfigurationError

LARGEST_SEED = 2**32 - 1  # numpy's


class RunTrainer(Trainer):
    """Lightning's trainer, which knows whether an accumulation was asked for.

    Args:
        accumulate_grad_batches: Micro-batches of a step on each device; None: what
            ``data.global_batch_size`` leaves, or 1.
    """

    def __init__(
        self, *args: Any, accumulate_grad_batches: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, accumulate_grad_batches=accumulate_grad_batches or 1, **kwargs)
        self.chosen_accumulation = accumulate_grad_batches


def check_seed(seed: int | bool) -> None:
    """Seeds are what every generator takes.

    Raises:
        ConfigurationError: if it is not.
    """
    if not isinstance(seed, bool) and not 0 <= seed <= LARGEST_SEED:
        raise ConfigurationError(f"seed_everything: must lie in 0 to {LARGEST_SEED}, got {seed}.")


def check_trainer(trainer: Any) -> None:
    """Look at every setting that can be judged without rows and weights.

    Raises:
        ConfigurationError: with every problem.
    """
    problems = []
    if trainer.precision not in (None, "32", 32, "32-true"):
        problems.append(
            f"trainer.precision: '{trainer.precision}' would change types after loading; leave it "
            "at 32-true and set model.quantization.compute_dtype."
        )
    if trainer.default_root_dir is not None:
        problems.append(
            "trainer.default_root_dir: a run's folder is run.root/run.name/version_N; set run.root."
        )
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        problems.append(
            f"trainer.gradient_clip_val: must be 0 or more, got {trainer.gradient_clip_val}."
        )
    if trainer.limit_train_batches == 0:
        problems.append("trainer.limit_train_batches: 0 trains nothing; write 1 or more, or null.")
    if problem := _interval_problem(trainer.val_check_interval):
        problems.append(f"trainer.val_check_interval: {problem}")
    for name in ("accumulate_grad_batches", "log_every_n_steps"):
        value = getattr(trainer, name)
        if value is not None and value < 1:
            problems.append(f"trainer.{name}: must be at least 1, got {value}.")
    for name in ("max_steps", "max_epochs"):
        value = getattr(trainer, name)
        if (value is not None and value < -1) or value == 0:
            problems.append(f"trainer.{name}: must be at least 1, or -1 for no limit, got {value}.")
    if problems:
        raise ConfigurationError(problems)


def refuse_dependent(run: Any) -> None:
    """Refuse settings of a parsed run whose meaning would depend on what auto comes to.

    Raises:
        ConfigurationError: naming each.
    """
    if run.data.batch_size != AUTO:
        return
    trainer, problems = run.trainer, []
    if trainer.accumulate_grad_batches is not None:
        problems.append(contradiction(trainer.accumulate_grad_batches))
    if run.model.normalize_loss_by == "micro_batches":
        problems.append(
            "data.batch_size: auto would change the loss, which model.normalize_loss_by: "
            "micro_batches makes depend on it; write a number, or normalise by tokens or rows."
        )
    keys = ["val_check_interval", "limit_train_batches", "overfit_batches"]
    of_evaluation = ["limit_val_batches", "num_sanity_val_steps"]
    for key in keys + (of_evaluation if run.data.eval_batch_size is None else []):
        value = getattr(trainer, key)
        if isinstance(value, int) and value > 0:
            named = "data.eval_batch_size" if key in of_evaluation else "data.batch_size"
            problems.append(
                f"trainer.{key}: {value} counts batches, whose size data.batch_size: auto leaves "
                f"open; write a share such as 0.5, or a number for {named}."
            )
    if problems:
        raise ConfigurationError(problems)


def contradiction(accumulation: int) -> str:
    """What a user is told who sets both halves of what is one choice."""
    return (
        f"trainer.accumulate_grad_batches: {accumulation} contradicts data.batch_size: auto, which "
        "chooses both; remove it, and set data.global_batch_size to the rows of a step."
    )


def refuse_long_interval(trainer: Any) -> None:
    """A validation that is counted within the epoch must come up in it.

    Raises:
        ConfigurationError: if it never does.
    """
    interval = trainer.val_check_interval
    counts_in_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
    if trainer.datamodule is None or not isinstance(interval, int) or not counts_in_epoch:
        return
    num_batches = micro_batches_of_epoch(trainer)
    if interval > num_batches:
        raise ConfigurationError(
            f"trainer.val_check_interval: {interval} is more than the {num_batches} micro-batches "
            "of an epoch; lower it, or set trainer.check_val_every_n_epoch: null to count on "
            "across epochs."
        )


def micro_batches_of_epoch(trainer: Any) -> int:
    """What each device does in an epoch, before Lightning has counted it."""
    num_batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)


def _interval_problem(interval: Any) -> str | None:
    if isinstance(interval, int) and interval < 1:
        return (
            f"must be at least 1 micro-batch, got {interval}; to leave validation out, set "
            "trainer.limit_val_batches: 0."
        )
    if isinstance(interval, float) and not 0 < interval <= 1:
        return (
            f"a share of the epoch lies above 0 and at most at 1, got {interval}; write a whole "
            "number for micro-batches."
        )
    return None
