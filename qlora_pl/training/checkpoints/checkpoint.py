"""``AdapterCheckpoint``: when a run is saved, what of it is kept, and how it continues.

A save belongs to the boundary between two optimizer steps. It is collected when the next batch
begins, or the epoch or the training ends, so that a validation which is due at that step is part of
it, and written in the background. A signal is answered at the end of a micro-batch, of training or
validation, with the state of the last boundary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.call import _call_callbacks_state_dict
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from qlora_pl.errors import CheckpointError, QLoRAError, TrainingStoppedError
from qlora_pl.files import publish_folder
from qlora_pl.training.checkpoints.adapter_save import AdapterSaver
from qlora_pl.training.checkpoints.boundary import Boundary
from qlora_pl.training.checkpoints.checkpoint_files import (
    Kept,
    Retention,
    VerifiedCheckpointIO,
    clear_leftovers,
    refuse_other_run,
    write_save,
)
from qlora_pl.training.checkpoints.checkpoint_writer import CheckpointWriter, on_host
from qlora_pl.training.checkpoints.random_state import restore_random_states
from qlora_pl.training.checkpoints.resuming import (
    carry_over,
    clipping,
    random_states_of,
    refuse_other_clipping,
    refuse_unknown_metric,
    take_up_schedules,
)
from qlora_pl.training.processes.agreement import FAILED, GO_ON, RankAgreement
from qlora_pl.training.run_folders.run_folder import checkpoint_path, product_path
from qlora_pl.training.stopping import StopRequest, finish_or_train, has_reached_its_end
from qlora_pl.training.trainer_settings import refuse_long_interval
from qlora_pl.training.watching.monitoring import validate_now

logger = logging.getLogger(__name__)


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
        keep_every_n_steps: Steps that this divides are saved and never deleted; None: no such.
    """

    def __init__(
        self,
        every_n_steps: int = 250,
        keep_last: int = 2,
        keep_best: int = 1,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        save_held_out: bool = True,
        keep_every_n_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.monitor = monitor
        self.retention = Retention(
            every_n_steps=every_n_steps,
            keep_last=keep_last,
            keep_best=keep_best,
            keep_every_n_steps=keep_every_n_steps,
            mode=mode,
        )
        self.scores: dict[int, float] = {}
        self.saved_steps: list[int] = []
        """Of the saves that are kept, the one that is being written included."""
        self.last_checkpoint: Path | None = None
        """The newest that is written and verified."""
        self.stop_request = StopRequest()
        self._saver = AdapterSaver(save_held_out)
        self._writer = CheckpointWriter()
        self._boundary: Boundary | None = None
        self._is_in_window = self._is_stepping = self._is_due = self._is_proven = False
        self._being_written: Path | None = None
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
        refuse_other_run(self.folder, trainer.ckpt_path)
        if trainer.ckpt_path is not None:
            trainer.num_sanity_val_steps = 0  # the run was validated before it began
        timeout = getattr(trainer.strategy, "_timeout", None)
        self._agreement = RankAgreement(trainer.world_size, timeout)
        loop = trainer.fit_loop
        loop.run = partial(finish_or_train, loop, loop.run)  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the random states of a resumed run, and clear away what a kill left behind."""
        self.stop_request.is_patient = True
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            clear_leftovers(self.folder)
        if self._loaded is None:
            return
        loaded, self._loaded = self._loaded, None
        restore_random_states(random_states_of(loaded["random_states"], trainer))
        take_up_schedules(trainer)
        self.last_checkpoint = Path(str(trainer.ckpt_path))
        if loaded["boundary"].get("is_validation_due"):
            validate_now(trainer)
        kept = self._keep(pl_module)
        if trainer.is_global_zero:
            kept.write()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The step before is over, with its validation."""
        if self._boundary is not None and not self._is_in_window:
            self._boundary = self._boundary.at_next_window()
        self._is_in_window = True
        self._save_if_due(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """From here to the end of the batch the parameters may be those of no step."""
        self._is_stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the boundary when an optimizer step has just ended; leave if that was asked for."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._boundary = Boundary.after_batch(trainer, batch_idx)
            self._is_due = self.retention.saves(trainer.global_step)
            self._is_stepping = self._is_in_window = False
        self._stop_if_agreed(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Until it has run it is due; one within a window is repeated with the window."""
        boundary = self._boundary
        if boundary is not None and not self._is_in_window:
            self._boundary = replace(boundary, is_validation_due=True)
        elif boundary is not None and boundary.callbacks is None:
            states = copy.deepcopy(_call_callbacks_state_dict(trainer))
            self._boundary = replace(boundary, callbacks=states)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Leave if that was asked for; a resumed run validates from the beginning."""
        if self.stop_request.is_patient:
            self._stop_if_agreed(trainer, pl_module)

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
        if self._boundary is not None and not self._is_in_window:
            self._boundary = replace(self._boundary, is_validation_due=False)
        step = trainer.global_step
        if score is None or step == 0:
            return
        self.scores[step] = float(score)
        if step in self.retention.best(self.scores):
            self._is_due = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's last step is over; the run's last is still to be validated."""
        if not (trainer.should_stop or has_reached_its_end(trainer)):
            self._save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, wait until it is written and proven, publish the finished adapter."""
        if (word := self._agreement.agree(self._word())) != GO_ON:
            self._leave(trainer, pl_module, word)
        self._is_due = True
        self._save_if_due(trainer, pl_module)
        if trainer.is_global_zero and self.saved_steps:
            newest = self._product_path(pl_module, self.saved_steps[-1])
            with self._noting_failure():
                self._writer.finish()
                self._keep(pl_module).write()  # with the score of a validation made up for
                self._saver.prove(trainer, pl_module, newest)
                publish_folder(newest, self.folder / str(pl_module.product))
        self._raise_if_any_failed()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Whatever ended the run, let what is being written be written."""
        if self._is_broken_by_signal(trainer, exception):
            with self._noting_failure():
                self._save_boundary(trainer, pl_module)
        self._writer.wait()
        if self._writer.error is not None and self._writer.error is not exception:
            logger.error("%s", self._writer.error)

    # -- leaving ---------------------------------------------------------------------------------

    def _word(self) -> int:
        return FAILED if self._writer.error is not None else self.stop_request.number or GO_ON

    def _is_broken_by_signal(self, trainer: Trainer, exception: BaseException) -> bool:
        """Whether a signal to all processes ended a loader's, and with it the run.

        Parameters and optimizer are those of the boundary then. With several ranks the others would
        have to come here, too, and may not.
        """
        request = self.stop_request
        if request.number is None or isinstance(exception, SIGTERMException | QLoRAError):
            return False
        return request.is_patient and not self._is_stepping and trainer.world_size == 1

    def is_stop_agreed(self) -> bool:
        """Whether any rank is to stop; all of them ask at the same time."""
        return self._agreement.agree(self._word()) != GO_ON

    def _stop_if_agreed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (word := self._agreement.exchange(self._word())) != GO_ON:
            self._leave(trainer, pl_module, word)

    def _leave(self, trainer: Trainer, pl_module: LightningModule, word: int) -> NoReturn:
        """Save the last boundary and end the run, on all ranks.

        Raises:
            SIGTERMException: when everything is written.
            TrainingStoppedError: if a save failed.
        """
        if word != FAILED:
            self.stop_request.number = word
            self._save_boundary(trainer, pl_module)
            self._writer.wait()
        self._raise_if_any_failed()
        raise SIGTERMException

    def _raise_if_any_failed(self) -> None:
        if self._agreement.agree(GO_ON if self._writer.error is None else FAILED) == FAILED:
            raise self._writer.error or TrainingStoppedError("The first rank could not save.")

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """An error of this rank alone is raised when all ranks agree on it."""
        try:
            yield
        except QLoRAError as error:
            self._writer.fail(error)

    # -- saving ----------------------------------------------------------------------------------

    def _save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due:
            self._is_due = False
            self._save_boundary(trainer, pl_module)

    def _save_boundary(self, trainer: Trainer, module: Any) -> None:
        """Copy the state of the last boundary and have it written; every rank comes here.

        Raises:
            TrainingStoppedError: if the save before could not be written, or the first is not what
                was handed over.
        """
        boundary = self._boundary
        if boundary is None or boundary.step in self.saved_steps:
            return
        self._writer.wait()
        self._raise_if_any_failed()
        self.last_checkpoint = self._being_written or self.last_checkpoint
        self.saved_steps.append(boundary.step)
        path = self._being_written = checkpoint_path(self.folder, boundary.step)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        kept = self._keep(module)
        if module.product == "adapter" and trainer.is_global_zero:
            checkpoint = on_host(checkpoint)  # of a whole model there may be no room for a copy
        if trainer.is_global_zero:
            with self._noting_failure():
                for log in trainer.loggers:  # what is logged up to here must survive a kill
                    log.save()
                folder = self._product_path(module, boundary.step)
                product = self._saver.prepare(
                    trainer, module, checkpoint["state_dict"], folder, boundary.step
                )
                self._writer.submit(partial(self._write, product, folder, checkpoint, path, kept))
                if not self._is_proven or module.product == "model":
                    self._writer.finish()
                    self._saver.prove(trainer, module, folder)
        if not self._is_proven or module.product == "model":
            self._is_proven = True
            self._raise_if_any_failed()

    def _write(self, product: Any, folder: Path, checkpoint: Any, path: Path, kept: Kept) -> None:
        write_save(product, folder, checkpoint, path, kept)
        self.last_checkpoint = path

    def _product_path(self, module: Any, step: int) -> Path:
        return product_path(self.folder, step, module.product)

    @property
    def best_step(self) -> int | None:
        """The step with the best score so far."""
        return next(iter(self.retention.best(self.scores)), None)

    def _keep(self, module: Any) -> Kept:
        """Forget the steps that are not kept any more, and say which are."""
        self.saved_steps = self.retention.keep(self.saved_steps, self.scores)
        best = self.best_step
        return Kept(
            run=self.folder,
            product=module.product,
            steps=tuple(self.saved_steps),
            best_step=best,
            best_score=None if best is None else self.scores[best],
        )

    # -- state -----------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add position, data, scores and random states; all of them are the boundary's."""
        boundary = self._boundary
        if boundary is None or boundary.step != trainer.global_step:
            return  # somebody saved in the middle of a step; such a file cannot be continued
        boundary.put_into(checkpoint)
        checkpoint["callbacks"].pop("Timer", None)  # each start has trainer.max_time for itself
        checkpoint["clipping"] = clipping(trainer)
        checkpoint["scores"] = dict(self.scores)
        if boundary.callbacks is not None:
            checkpoint["scores"].pop(boundary.step, None)
        checkpoint["saved_steps"] = list(self.saved_steps)
        data = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["data"] = data.describe() if hasattr(data, "describe") else None
        checkpoint["random_states"] = self._agreement.gather(boundary.random_states)

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
            at = data.resume_from(checkpoint["data"], boundary["epoch"], boundary["position"])
            carry_over(checkpoint, at, trainer)
        self.scores = dict(checkpoint["scores"])
        self.saved_steps = list(checkpoint["saved_steps"])
        self._loaded = checkpoint
