"""Why a fit ended: at its limits, by its clock, or by a signal.

Only a run that reached what it was asked for is complete. One that ran out of time or was told to
stop is continued by ``--ckpt_path last`` and ``auto``.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.training.run_folder import newest_verified, step_of


def has_reached_its_end(trainer: Trainer) -> bool:
    """Whether the run's limits are reached, or another callback than a clock ended it."""
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    if trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs:
        return True
    return trainer.should_stop and not is_out_of_time(trainer)


def is_out_of_time(trainer: Trainer) -> bool:
    """Whether ``max_time`` has run out."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in timers]
    return any(seconds is not None and seconds <= 0 for seconds in left)


@contextmanager
def ending_on_sigterm(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM end the command at once, or during training after the step.

    Lightning's own handler, which is set only when the loop starts, waits for the end of a training
    batch; that never comes while weights are loaded, or in ``validate`` and ``predict``.
    """

    def stop(*_: Any) -> None:
        if not (trainer.received_sigterm and trainer.training):
            raise SIGTERMException

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped_by_signal(end: SystemExit, folder: Path, is_fit: bool) -> TrainingStoppedError | None:
    """The error that says so if a signal ended Lightning's run, with a shell's exit code for it.

    Args:
        end: What Lightning raised.
        folder: Of the run.
        is_fit: Whether it can be continued.
    """
    if isinstance(end, SIGTERMException):
        number = signal.SIGTERM
    elif isinstance(end.__context__, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        return None
    newest = newest_verified(folder) if is_fit else None
    if newest is not None:
        sentence = f"Stopped at step {step_of(newest)}; continue with --ckpt_path last."
    else:
        sentence = "Stopped before the first checkpoint." if is_fit else "Stopped."
    error = TrainingStoppedError(sentence)
    error.exit_code = 128 + number
    return error
