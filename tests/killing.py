"""A callback that kills its own process, for tests of real runs."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import Callback, Trainer


class KillAt(Callback):
    """Sends a signal at the start of a micro-batch, counted over the whole run."""

    def __init__(self, micro_batch: int, number: int = signal.SIGKILL) -> None:
        self.micro_batch = micro_batch
        self.number = number

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.micro_batch:
            os.kill(os.getpid(), self.number)
