"""Why a fit ended: at its limits, by its clock, or by a signal; and what a signal does.

Only a run that reached what it was asked for is complete. One that ran out of time or was told to
stop is continued by ``--ckpt_path last`` and ``auto``, and its exit code is never 0: Kubernetes
would take it for done.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qlora_pl.errors import QLoRAError, TrainingStoppedError
from qlora_pl.training.run_folders.run_folder import newest_verified, step_of

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to save and leave; the second is what SLURM sends before a job's time is up."""


def has_reached_its_end(trainer: Trainer) -> bool:
    """Whether the run's limits are reached, or another callback than a clock ended it."""
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    # Lightning counts an epoch that a clock has cut short like any other.
    is_cut_short = trainer.should_stop and not trainer.is_last_batch
    if trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs and not is_cut_short:
        return True
    return trainer.should_stop and not is_out_of_time(trainer)


def is_out_of_time(trainer: Trainer) -> bool:
    """Whether ``max_time`` has run out."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in timers]
    return any(seconds is not None and seconds <= 0 for seconds in left)


def finish_or_train(loop: Any, train: Callable[[], None]) -> None:
    """Run Lightning's fit loop, also where a resumed run has no step left to do.

    A run may be stopped after its last step, while it is validated, sampled or published. Lightning
    would skip the end of such a run with its steps.

    Args:
        loop: The trainer's fit loop.
        train: Its own ``run``.
    """
    loop.setup_data()
    if loop.trainer.ckpt_path is None or not loop.trainer.global_step or not loop.skip:
        train()
        return
    loop.reset()
    loop.on_run_start()
    loop._restarting = False
    loop.on_run_end()


class StopRequest:
    """A signal that asks the run to end.

    While a step may be under way the run is patient: it goes on to a point where all ranks can save
    and leave. Before that, while weights are loaded, and in commands that do not train, a signal
    ends the command where it is.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came, None: none has."""
        self.is_patient = False
        self.launcher: Any = None
        """What started this run's further processes, if it did: Lightning's."""
        self._process = os.getpid()

    def receive(self, number: int, _: Any = None) -> None:
        """Handle a signal; one that comes while the run is leaving changes nothing.

        Raises:
            SIGTERMException: where the run is not patient.
        """
        if os.getpid() != self._process:
            _end_as_if_unhandled(number)
            return
        if self.number is not None:
            return
        self.number = number
        if self.launcher is not None:
            self.launcher.kill(signal.SIGTERM)
        if not self.is_patient:
            raise SIGTERMException


def _end_as_if_unhandled(number: int) -> None:
    """A loader's process inherits the handler of the run; only SIGTERM is meant for it."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def request_of(trainer: Any) -> StopRequest:
    """The request that a run's checkpoint callback acts on; one that nobody makes without it."""
    request = getattr(trainer.checkpoint_callback, "stop_request", None)
    return request if isinstance(request, StopRequest) else StopRequest()


def is_told_to_stop(trainer: Any, together: bool) -> bool:
    """Whether to leave off what a resumed run does again.

    Args:
        trainer: Of the run.
        together: Whether all ranks ask this at the same points, and so have to be told alike.
    """
    agree = getattr(trainer.checkpoint_callback, "is_stop_agreed", None)
    if together and agree is not None:
        return bool(agree())
    return request_of(trainer).number is not None


@contextmanager
def leaving_on_signals(trainer: Trainer) -> Iterator[StopRequest]:
    """Let SIGTERM and SIGUSR1 within the block be ``StopRequest``'s.

    Lightning's own ways are switched off: its handler starts an exchange between ranks wherever the
    main thread happens to be, listens to rank 0 alone, and has every device wait for that rank in
    every micro-batch.
    """
    request = request_of(trainer)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    trainer._signal_connector.register_signal_handlers = _do_nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]
    request.launcher = getattr(trainer.strategy, "launcher", None)
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _do_nothing() -> None:
    pass


class StoppedBySignal(TrainingStoppedError):
    """A signal ended the command; everything that a resumed run needs is on disk.

    ``number`` is the signal. The exit code is a shell's: 130 for Ctrl-C, else 143, whichever signal
    asked for it.
    """

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.number = number
        self.exit_code = 128 + (number if number == signal.SIGINT else signal.SIGTERM)


def lost_loader(end: BaseException) -> TrainingStoppedError | None:
    """The error that says so if a process that loads rows died, which torch tells in words only."""
    told = str(end)
    if not isinstance(end, RuntimeError) or not told.startswith("DataLoader worker"):
        return None
    return TrainingStoppedError(
        f"A process that loads rows died ({told.splitlines()[0].rstrip('. ')}); what was saved is "
        "untouched: resume with --ckpt_path last, and with fewer data.num_workers if the machine "
        "ran out of memory."
    )


def stopped_by_signal(
    end: BaseException, request: StopRequest, folder: Path, is_fit: bool
) -> StoppedBySignal | None:
    """The error that says so if a signal ended Lightning's run; the save is complete then.

    Args:
        end: What Lightning raised.
        request: Of the run.
        folder: Of the run.
        is_fit: Whether it can be continued.
    """
    if isinstance(end.__context__, KeyboardInterrupt):
        number = int(signal.SIGINT)
    elif isinstance(end, SIGTERMException):
        number = request.number or int(signal.SIGTERM)  # or it came to another rank
    elif request.number is not None and not isinstance(end, QLoRAError):
        number = request.number  # what broke in a process group that was told to end
    else:
        return None
    newest = newest_verified(folder) if is_fit else None
    if newest is not None:
        sentence = f"Stopped at step {step_of(newest)}; continue with --ckpt_path last."
    else:
        sentence = "Stopped before the first checkpoint." if is_fit else "Stopped."
    return StoppedBySignal(sentence, number)
