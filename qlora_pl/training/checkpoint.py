"""``AdapterCheckpoint``: when a run is saved, what of it is kept, and how it continues.

A save belongs to the boundary between two optimizer steps. It is written when the next batch
begins, or the epoch or the training ends, so that a validation which is due at that step is part of
it; and it holds Lightning's progress in one canonical form, from which every run goes on alike.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from qlora_pl.errors import CheckpointError, ConfigurationError
from qlora_pl.files import remove_leftovers, serialize, sha256_bytes, write_atomic, write_json
from qlora_pl.training.adapter_save import AdapterSaver
from qlora_pl.training.random_state import collect_random_states, restore_random_states
from qlora_pl.training.resuming import (
    clipping,
    refuse_other_clipping,
    refuse_unknown_metric,
    take_up_schedules,
)
from qlora_pl.training.run_folder import (
    checkpoint_path,
    damage,
    digest_path,
    newest_verified,
    product_path,
    step_of,
    verifies,
)
from qlora_pl.training.stopping import has_reached_its_end
from qlora_pl.training.trainer_settings import refuse_long_interval


@dataclass(frozen=True)
class Boundary:
    """A point between two optimizer steps."""

    step: int
    """Optimizer steps done."""
    epoch: int
    position: int
    """Micro-batches of the epoch that are done, on each device."""
    is_epoch_end: bool


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, its SHA-256 beside it, and checks it on reading.

    ``torch.load`` reads a file with a flipped bit without a word.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Serialise to memory, then write the digest, then the data that make it valid."""
        target = Path(path)
        data = serialize(checkpoint)
        write_atomic(digest_path(target), f"{sha256_bytes(data)}  {target.name}\n")
        write_atomic(target, data)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and primitives onto the CPU.

        Raises:
            CheckpointError: if the file is not what was written, or holds code.
        """
        if damage(Path(path), anew=True) is not None:
            raise CheckpointError(f"'{path}' is damaged or has no digest; use another checkpoint.")
        try:
            loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # UnpicklingError, RuntimeError: whoever wrote its digest too
            raise CheckpointError(
                f"'{path}' holds more than tensors and plain values, which is not run here, or is "
                "no checkpoint at all; use one that qlora_pl wrote."
            ) from error
        return loaded


class AdapterCheckpoint(Checkpoint):
    """Saves trained tensors, optimizer, schedule, random states and position, and adapter folders.

    Args:
        every_n_steps: Optimizer steps between saves; the first and the last step are saved too.
        keep_last: Newest checkpoints that are kept.
        keep_best: Best checkpoints that are kept besides, by ``monitor``.
        monitor: The metric that says which is best: ``val/loss`` (nats a trained token) or
            ``val/perplexity``.
        mode: Whether less or more of it is better.
        save_held_out: Whether up to 64 encoded validation rows go into the adapter folder, for
            later commands to score with.
    """

    def __init__(
        self,
        every_n_steps: int = 250,
        keep_last: int = 2,
        keep_best: int = 1,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        save_held_out: bool = True,
    ) -> None:
        super().__init__()
        problems = [
            f"checkpoint.{name}: must be at least {least}, got {value}."
            for name, value, least in (
                ("every_n_steps", every_n_steps, 1),
                ("keep_last", keep_last, 1),
                ("keep_best", keep_best, 0),
            )
            if value < least
        ]
        if problems:
            raise ConfigurationError(problems)
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.monitor = monitor
        self.mode = mode
        self.scores: dict[int, float] = {}
        self.saved_steps: list[int] = []
        self.last_checkpoint: Path | None = None
        self._saver = AdapterSaver(save_held_out)
        self._boundary: Boundary | None = None
        self._is_due = False
        self._loaded: dict[str, Any] | None = None

    # -- hooks -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read and write through ``VerifiedCheckpointIO``; the rows are known now, weights not yet.

        Raises:
            ConfigurationError: if a validation is due after more batches than an epoch has.
        """
        if stage == "fit":
            refuse_long_interval(trainer)
        trainer.strategy.checkpoint_io = VerifiedCheckpointIO()
        self.folder = Path(trainer.default_root_dir)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that is another run's.

        Raises:
            ConfigurationError: if it holds a checkpoint that this run does not continue.
        """
        newest = newest_verified(self.folder)
        resumed = trainer.ckpt_path
        if resumed is not None:
            trainer.num_sanity_val_steps = 0  # the run was validated before it began
        if newest is not None and (resumed is None or Path(resumed).resolve() != newest.resolve()):
            raise ConfigurationError(
                f"'{self.folder}' holds another run, which is never overwritten; resume it with "
                f"--ckpt_path {newest}, or choose another folder."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the random states of a resumed run, and clear away what a kill left behind."""
        if trainer.is_global_zero:
            for name in ("checkpoints", "adapters", "models"):
                remove_leftovers(self.folder / name)
        if self._loaded is not None:
            states = self._loaded["random_states"]
            restore_random_states(states[min(trainer.global_rank, len(states) - 1)])
            take_up_schedules(trainer)
            self.last_checkpoint = Path(str(trainer.ckpt_path))
            # A validation before the next step ends is this step's.
            self._boundary = Boundary(**self._loaded["boundary"], is_epoch_end=False)
            self._loaded = None
            self._discard(trainer)
        self._last_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The step before is over, with its validation."""
        self._save_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the boundary when an optimizer step has just ended."""
        if trainer.global_step == self._last_step:
            return
        is_first = self._last_step == 0
        self._last_step = trainer.global_step
        is_epoch_end = batch_idx + 1 >= trainer.num_training_batches
        self._boundary = Boundary(
            trainer.global_step, trainer.current_epoch, batch_idx + 1, is_epoch_end
        )
        self._is_due = is_first or trainer.global_step % self.every_n_steps == 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the score; a best one is due to be saved.

        Raises:
            ConfigurationError: if there is no such metric, before the first step.
        """
        if trainer.state.fn != "fit":
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None and trainer.sanity_checking:
            refuse_unknown_metric(self.monitor, trainer)
        if score is None or self._boundary is None:
            return
        self.scores[self._boundary.step] = float(score)
        if self._boundary.step in self._best_steps():
            self._is_due = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's last step is over; the run's last is still to be validated."""
        if not (trainer.should_stop or has_reached_its_end(trainer)):
            self._save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, wait for every check, and publish the finished adapter."""
        if self._boundary is not None and self._boundary.step not in self.saved_steps:
            self._is_due = True
            self._save_if_due(trainer, pl_module)
        if trainer.is_global_zero and self.saved_steps:
            self._saver.finish(pl_module)
            newest = self._product_path(pl_module, self.saved_steps[-1])
            self._saver.publish(newest, self.folder / str(pl_module.product))

    # -- saving ----------------------------------------------------------------------------------

    def _save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        boundary = self._boundary
        if boundary is None or not self._is_due:
            return
        self._is_due = False
        if boundary.step in self.saved_steps:
            return
        if trainer.is_global_zero:
            self._saver.raise_if_failed()
            for log in trainer.loggers:  # what is logged up to here must survive a kill
                log.save()
        self.saved_steps.append(boundary.step)
        path = checkpoint_path(self.folder, boundary.step)
        # The adapter first: a step whose checkpoint is there has its adapter, wherever a kill came.
        if trainer.is_global_zero:
            folder = self._product_path(pl_module, boundary.step)
            shutil.rmtree(folder, ignore_errors=True)
            self._saver.write(trainer, pl_module, folder, boundary.step)
        if not verifies(path):
            trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            self._saver.verify(pl_module, path)
        self.last_checkpoint = path
        self._discard(trainer)

    def _product_path(self, module: Any, step: int) -> Path:
        return product_path(self.folder, step, module.product)

    def _best_steps(self) -> list[int]:
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(self.scores, key=lambda step: (sign * self.scores[step], step))
        return ranked[: self.keep_best]

    @property
    def best_step(self) -> int | None:
        """The step with the best score so far."""
        ranked = self._best_steps()
        return ranked[0] if ranked else None

    def _discard(self, trainer: Trainer) -> None:
        """Delete what is neither among the newest nor among the best, and say what is kept."""
        keep = {*self.saved_steps[-self.keep_last :], *self._best_steps()}
        self.saved_steps = [step for step in self.saved_steps if step in keep]
        if not trainer.is_global_zero:
            return
        write_json(
            self.folder / "checkpoints" / "kept.json",
            {
                "steps": self.saved_steps,
                "best_step": self.best_step,
                "best_score": None if self.best_step is None else self.scores[self.best_step],
            },
        )
        for path in (self.folder / "checkpoints").glob("step-*.ckpt"):
            if step_of(path) not in keep:
                folder = self._product_path(trainer.lightning_module, step_of(path))
                self._saver.settle(folder)
                path.unlink()
                digest_path(path).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)

    # -- state -----------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add position, data, scores and random states; put the loops into their canonical form."""
        boundary = self._boundary
        if boundary is None or boundary.step != trainer.global_step:
            return  # somebody saved in the middle of a step; such a file cannot be continued
        checkpoint["boundary"] = {
            "step": boundary.step,
            "epoch": boundary.epoch + boundary.is_epoch_end,
            "position": 0 if boundary.is_epoch_end else boundary.position,
        }
        checkpoint["clipping"] = clipping(trainer)
        checkpoint["callbacks"].pop("Timer", None)  # each start has trainer.max_time for itself
        checkpoint["scores"] = dict(self.scores)
        checkpoint["saved_steps"] = list(self.saved_steps)
        data = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["data"] = data.describe() if hasattr(data, "describe") else None
        checkpoint["random_states"] = _gather(collect_random_states(), trainer)
        _canonical_progress(checkpoint["loops"]["fit_loop"], boundary)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Move the data to the saved position and remember the rest until training starts."""
        if trainer.state.fn != "fit":
            return
        if "boundary" not in checkpoint:
            raise CheckpointError(
                f"'{trainer.ckpt_path}' was not written between two optimizer steps by qlora_pl, "
                "so no run can continue from it exactly."
            )
        refuse_other_clipping(checkpoint["clipping"], trainer)
        boundary = checkpoint["boundary"]
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "resume_from") and checkpoint["data"] is not None:
            data.resume_from(checkpoint["data"], boundary["epoch"], boundary["position"])
        self.scores = dict(checkpoint["scores"])
        self.saved_steps = list(checkpoint["saved_steps"])
        self._loaded = checkpoint


def _gather(states: dict[str, Any], trainer: Trainer) -> list[dict[str, Any]]:
    if trainer.world_size == 1:
        return [states]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, states)
    return gathered


def _canonical_progress(fit_loop: dict[str, Any], boundary: Boundary) -> None:
    """Rewrite Lightning's counters as they are just before the next batch.

    The hooks in which a save may happen leave them in half a dozen states, each of which Lightning
    resumes from differently: it may skip a validation, count a batch twice or end an epoch again.
    Here they are always "n batches completed", and the end of an epoch is the start of the next.
    """
    epochs = boundary.epoch + boundary.is_epoch_end
    position = 0 if boundary.is_epoch_end else boundary.position
    begun = epochs + (position > 0)
    for scope in ("total", "current"):
        fit_loop["epoch_progress"][scope].update(
            ready=begun, started=begun, processed=epochs, completed=epochs
        )
        batches = fit_loop["epoch_loop.batch_progress"][scope]
        count = position if scope == "current" else batches["processed"]
        batches.update(dict.fromkeys(("ready", "started", "processed", "completed"), count))
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = boundary.step
    if position == 0:
        optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for progress in (*optimizer.values(), fit_loop["epoch_loop.scheduler_progress"]):
            progress["current"].update(dict.fromkeys(progress["current"], 0))
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    for scope in ("total", "current"):
        validation[scope].update(dict.fromkeys(validation[scope], 0))
