"""``Boundary``: a point between two optimizer steps, and what of a run moves until the next one.

Parameters and optimizer change only in a step; random states and Lightning's counters change with
every micro-batch. Noted at each boundary, they let a run that must stop in the middle of a window
of accumulation save the state from which that window is repeated, byte for byte.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Trainer

from qlora_pl.training.checkpoints.random_state import collect_random_states


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Where a run stands between two optimizer steps, in plain types and tensors."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Epochs done; the end of one is the start of the next."""
    position: int
    """Micro-batches of the epoch that are done, on each device."""
    is_validation_due: bool
    """Whether a validation that is due at this step has not run."""
    progress: dict[str, Any]
    """State of Lightning's fit loop, in the form of ``canonical_progress``."""
    random_states: dict[str, Any]
    """Of this process."""
    callbacks: dict[str, Any] | None = None
    """State of the callbacks before a validation in the middle of the window, which a resumed run
    repeats; None: there was none, and theirs is that of the boundary."""

    @classmethod
    def after_batch(cls, trainer: Trainer, batch_idx: int) -> Boundary:
        """The boundary after the step that ``on_train_batch_end`` has seen."""
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        is_epoch_end = batch_idx + 1 >= trainer.num_training_batches
        epoch = trainer.current_epoch + is_epoch_end
        position = 0 if is_epoch_end else batch_idx + 1
        progress = copy.deepcopy(trainer.fit_loop.state_dict())
        return cls(
            step=trainer.global_step,
            epoch=epoch,
            position=position,
            is_validation_due=loop._should_check_val_fx(fetcher),
            progress=canonical_progress(progress, trainer.global_step, epoch, position),
            random_states=collect_random_states(),
        )

    def at_next_window(self) -> Boundary:
        """The same when the next window begins: validations and hooks may have drawn numbers."""
        return replace(self, random_states=collect_random_states())

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint that Lightning made later say where the boundary was."""
        checkpoint["boundary"] = {
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "is_validation_due": self.is_validation_due,
        }
        checkpoint["loops"]["fit_loop"] = self.progress
        if self.callbacks is not None:
            checkpoint["callbacks"] = dict(self.callbacks)


def canonical_progress(
    fit_loop: dict[str, Any], step: int, epochs: int, position: int
) -> dict[str, Any]:
    """Rewrite Lightning's counters, in place, as they are just before the next batch.

    The hooks in which a save may happen leave them in half a dozen states, each of which Lightning
    resumes from differently: it may skip a validation, count a batch twice or end an epoch again.
    Here they are always "n batches completed", and the end of an epoch is the start of the next.

    Args:
        fit_loop: State of the fit loop.
        step: Optimizer steps done.
        epochs: Epochs done.
        position: Micro-batches done of the epoch after these.
    """
    begun = epochs + (position > 0)
    for scope in ("total", "current"):
        fit_loop["epoch_progress"][scope].update(
            ready=begun, started=begun, processed=epochs, completed=epochs
        )
        batches = fit_loop["epoch_loop.batch_progress"][scope]
        count = position if scope == "current" else batches["processed"]
        batches.update(dict.fromkeys(("ready", "started", "processed", "completed"), count))
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    if position == 0:
        optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for progress in (*optimizer.values(), fit_loop["epoch_loop.scheduler_progress"]):
            progress["current"].update(dict.fromkeys(progress["current"], 0))
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    validation["is_last_batch"] = False  # as before the first validation of this start
    for scope in ("total", "current"):
        validation[scope].update(dict.fromkeys(validation[scope], 0))
    return fit_loop
