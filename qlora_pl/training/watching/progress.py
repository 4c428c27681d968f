"""The progress bar, which counts epochs only up to where epochs end the run."""

from __future__ import annotations

from importlib.util import find_spec

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


class EpochBar(RichProgressBar):
    """Lightning's bar without its "Epoch 0/-2" and "5/2" where ``max_steps`` alone ends the run."""

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of an epoch; Lightning would count the steps that are left instead."""
        return self.trainer.num_training_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "")


def default_bars(callbacks: list[Callback], is_enabled: bool | None) -> list[Callback]:
    """What to add to a trainer's callbacks: nothing if there is a bar, or none is wanted or shown.

    Without rich Lightning falls back to tqdm, whose bar counts no epochs.
    """
    is_chosen = any(isinstance(callback, ProgressBar) for callback in callbacks)
    return [] if is_chosen or is_enabled is False or find_spec("rich") is None else [EpochBar()]
