"""Callbacks that harm their own process, for tests of real runs."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


class KillAt(Callback):
    """Sends a signal at the start of a micro-batch, counted over the whole run.

    Args:
        micro_batch: From 0.
        number: The signal.
        rank: Of the process that is sent it; None: every one.
    """

    def __init__(
        self, micro_batch: int, number: int = int(signal.SIGKILL), rank: int | None = None
    ) -> None:
        self.micro_batch = micro_batch
        self.number = number
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        is_here = self.rank in (None, trainer.global_rank)
        if is_here and trainer.fit_loop.epoch_loop.total_batch_idx == self.micro_batch:
            os.kill(os.getpid(), self.number)


class KillInSave(KillAt):
    """Sends it while the state of a step is collected; ``micro_batch`` is that step."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Nothing."""

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.micro_batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class NotePid(Callback):
    """Leaves the process's number in the working directory."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        Path(f"rank{trainer.global_rank}.pid").write_text(str(os.getpid()))


class NanAt(Callback):
    """Makes a trained weight of one rank no number at the start of a micro-batch."""

    def __init__(self, micro_batch: int, rank: int) -> None:
        self.micro_batch = micro_batch
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        is_now = trainer.fit_loop.epoch_loop.total_batch_idx == self.micro_batch
        if is_now and trainer.global_rank == self.rank:
            with torch.no_grad():
                next(iter(module.trained_tensors().values())).fill_(float("nan"))


class FullDiskAt(Callback):
    """Lets the checkpoint of a step meet a full disk."""

    def __init__(self, step: int) -> None:
        self.step = step

    def setup(self, *_: Any, **__: Any) -> None:
        real, name = os.fsync, f"step-{self.step:08d}.ckpt"

        def fsync(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        os.fsync = fsync
