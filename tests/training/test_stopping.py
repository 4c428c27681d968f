"""Signals end a command where nothing waits for the end of a batch, and else after it."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qlora_pl.training.stopping import ending_on_sigterm, stopped_by_signal


@pytest.mark.parametrize(
    ("received", "training", "waits"),
    [
        (False, True, False),  # weights are being loaded: Lightning's handler is not there yet
        (True, False, False),  # validate, test, predict, or a validation
        (True, True, True),  # Lightning looks after each batch
    ],
)
def test_sigterm_waits_for_nothing_but_a_training_batch(
    received: bool, training: bool, waits: bool
) -> None:
    trainer: Any = SimpleNamespace(received_sigterm=received, training=training)
    before = signal.getsignal(signal.SIGTERM)
    if waits:
        with ending_on_sigterm(trainer):
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        with pytest.raises(SIGTERMException), ending_on_sigterm(trainer):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_exit_that_no_signal_caused_is_left_alone(tmp_path: Any) -> None:
    assert stopped_by_signal(SystemExit(3), tmp_path, is_fit=True) is None


def test_a_command_that_does_not_train_just_says_that_it_stopped(tmp_path: Any) -> None:
    stopped = stopped_by_signal(SIGTERMException(), tmp_path, is_fit=False)
    assert stopped is not None
    assert str(stopped) == "Stopped."
    assert stopped.exit_code == 143
