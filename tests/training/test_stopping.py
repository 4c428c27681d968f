"""What a signal does where it comes, and what a command says that one ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.stopping import (
    SIGNALS,
    StopRequest,
    leaving_on_signals,
    lost_loader,
    stopped_by_signal,
)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[AdapterCheckpoint()],
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_what_is_not_training_at_once(trainer: Trainer, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SIGTERMException), leaving_on_signals(trainer):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_training_is_left_to_end_its_micro_batch(trainer: Trainer, number: int) -> None:
    with leaving_on_signals(trainer) as request:
        request.is_patient = True
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.number == number
    assert trainer.checkpoint_callback.stop_request is request


def test_lightning_hears_no_signal_itself(trainer: Trainer) -> None:
    """Its handler broadcasts between ranks wherever the main thread happens to be."""
    with leaving_on_signals(trainer) as request:
        trainer._signal_connector.register_signal_handlers()
        assert signal.getsignal(signal.SIGTERM) == request.receive


def test_a_process_forked_from_the_run_ends_by_sigterm_as_any_other(trainer: Trainer) -> None:
    """Pools of processes are ended so; SIGUSR1, sent to a whole job, is not meant for them."""
    with leaving_on_signals(trainer) as request:
        request.is_patient = True
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert request.number is None


def test_the_processes_that_lightning_started_are_told_too() -> None:
    told: list[int] = []
    request = StopRequest()
    request.is_patient, request.launcher = True, SimpleNamespace(kill=told.append)
    request.receive(signal.SIGUSR1)
    request.receive(signal.SIGTERM)
    assert told == [signal.SIGTERM]


def make_request(number: int | None) -> StopRequest:
    request = StopRequest()
    request.number = number
    return request


@pytest.mark.parametrize(
    ("end", "number", "exit_code"),
    [
        (SIGTERMException(), signal.SIGTERM, 143),
        (SIGTERMException(), signal.SIGUSR1, 143),
        (SIGTERMException(), None, 143),  # it came to another rank
        (RuntimeError("a loader's process was killed"), signal.SIGTERM, 143),
        (RuntimeError("something else"), None, None),
        (TrainingStoppedError("The disk is full."), signal.SIGTERM, None),
        (SystemExit(3), None, None),
    ],
)
def test_a_command_says_that_a_signal_ended_it(
    tmp_path: Path, end: BaseException, number: int | None, exit_code: int | None
) -> None:
    stopped = stopped_by_signal(end, make_request(number), tmp_path, is_fit=True)
    assert (stopped and stopped.exit_code) == exit_code
    if stopped is not None:
        assert str(stopped) == "Stopped before the first checkpoint."
        assert stopped.number == number or number is None


def test_ctrl_c_has_its_own_exit_code(tmp_path: Path) -> None:
    end: Any = SystemExit(1)
    end.__context__ = KeyboardInterrupt()
    stopped = stopped_by_signal(end, make_request(None), tmp_path, is_fit=False)
    assert stopped is not None
    assert (stopped.number, stopped.exit_code, str(stopped)) == (signal.SIGINT, 130, "Stopped.")


class Dying(Dataset[int]):
    """Its process is killed, as the kernel does when memory runs out."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return place


def test_a_loader_that_was_killed_is_one_sentence() -> None:
    with pytest.raises(RuntimeError) as raised:
        list(DataLoader(Dying(), num_workers=1))
    told = str(lost_loader(raised.value))
    assert told.startswith("A process that loads rows died (DataLoader worker (pid")
    assert "resume with --ckpt_path last" in told
    assert lost_loader(RuntimeError("another")) is None
