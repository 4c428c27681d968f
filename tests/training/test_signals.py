"""A run that is told to end saves the last boundary at once, and goes on as if nothing had been.

Signals are real, sent by the process to itself at a hook; ``run`` is two epochs of ten
micro-batches with dropout. ``test_end_to_end`` does the same to whole commands.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_resume import adapter_bytes, history, run

from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.training.run_folders.run_folder import is_complete, newest_verified, step_of
from qlora_pl.training.watching.samples import SampleWriter

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]

RARELY = {"every_n_steps": 100}
PACKED = {"packing": True, "max_length": 64, "batch_size": 1}


class SignalAt(Callback):
    """Sends a signal when a hook is called for the nth time, counted from 0."""

    def __init__(self, hook: str, count: int = 0, number: int = signal.SIGTERM) -> None:
        self.calls = 0

        def send(*_: Any, **__: Any) -> None:
            if self.calls == count:
                os.kill(os.getpid(), number)
            self.calls += 1

        setattr(self, hook, send)


def stop(folder: Path, base: Path, rows: Path, *callbacks: Callback, **changes: Any) -> int:
    """Run until a signal ends it; the step of the newest checkpoint, -1 without."""
    with pytest.raises(SIGTERMException):
        run(folder, base, rows, callbacks=list(callbacks), **{"checkpoint": RARELY} | changes)
    assert not (folder / "metrics.json").exists() or not is_complete(folder)
    assert not list(folder.rglob(".incomplete-*"))
    newest = newest_verified(folder)
    return -1 if newest is None else step_of(newest)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Any:
    """An uninterrupted run of each kind, made when it is first asked for."""
    made: dict[str, Path] = {}

    def get(**changes: Any) -> Path:
        if str(changes) not in made:
            made[str(changes)] = folder = tmp_path_factory.mktemp("whole")
            run(folder, tiny_base, rows_file, checkpoint=RARELY, **changes)
        return made[str(changes)]

    return get


def assert_same(folder: Path, whole: Path) -> None:
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert history(folder) == history(whole)
    kept = [json.loads((path / "checkpoints/kept.json").read_text()) for path in (folder, whole)]
    for name in ("best_step", "best_score"):
        assert kept[0][name] == kept[1][name]


MICRO_BATCHES = [
    pytest.param(micro_batch, marks=[] if micro_batch in (6, 9) else [pytest.mark.slow])
    for micro_batch in range(4, 11)
]


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_a_signal_within_a_window_is_answered_after_the_micro_batch(
    tmp_path: Path, tiny_base: Path, rows_file: Path, whole: Any, micro_batch: int
) -> None:
    """Windows of 4, 4 and 2; validations after 5 and 10, so that 6 and 7 lie behind one of them.

    The window is dropped and repeated, dropout and validation included.
    """
    step = stop(
        tmp_path,
        tiny_base,
        rows_file,
        SignalAt("on_train_batch_start", micro_batch),
        accumulation=4,
    )
    done = micro_batch + 1  # the micro-batch at hand ends, and its step if it is the last
    assert step == {4: 1, 5: 1, 6: 1, 7: 1, 8: 2, 9: 2, 10: 3, 11: 3}[done]
    run(tmp_path, tiny_base, rows_file, None, True, 4, checkpoint=RARELY)
    assert_same(tmp_path, whole(accumulation=4))


@pytest.mark.parametrize("micro_batch", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_a_signal_within_a_window_of_packs_is_answered_alike(
    tmp_path: Path, tiny_base: Path, rows_file: Path, whole: Any, micro_batch: int
) -> None:
    changes = {"accumulation": 2, "data": PACKED, "val_check_interval": 1.0}
    stop(tmp_path, tiny_base, rows_file, SignalAt("on_train_batch_start", micro_batch), **changes)
    run(tmp_path, tiny_base, rows_file, resume=True, checkpoint=RARELY, **changes)
    assert_same(tmp_path, whole(**changes))


def test_a_validation_that_a_signal_cut_short_is_run_on_resuming(
    tmp_path: Path, tiny_base: Path, rows_file: Path, whole: Any
) -> None:
    """Validations are due at steps 5, 10, ...; plain Lightning would go on with step 6."""
    step = stop(
        tmp_path, tiny_base, rows_file, SignalAt("on_validation_batch_start", 1), accumulation=1
    )
    assert step == 5
    checkpoint = torch.load(newest_verified(tmp_path), weights_only=True)
    assert checkpoint["boundary"]["is_validation_due"]
    assert 5 not in checkpoint["scores"]
    run(tmp_path, tiny_base, rows_file, resume=True, checkpoint=RARELY)
    assert_same(tmp_path, whole())
    assert {row[0] for row in history(tmp_path) if row[-1]} == {"0", "5", "10", "15", "20"}


@pytest.mark.parametrize(
    ("hook", "count", "step"),
    [
        pytest.param("on_before_optimizer_step", 6, 7, id="in-a-step"),
        pytest.param("on_validation_end", 1, 6, id="after-a-validation"),
        pytest.param("on_save_checkpoint", 0, 2, id="in-a-save"),
        pytest.param("on_train_epoch_end", 0, 11, id="at-the-end-of-an-epoch"),
        pytest.param("on_validation_batch_start", 4, 20, id="in-the-last-validation"),
        pytest.param("on_train_end", 0, 20, id="after-the-last-step"),
    ],
)
def test_a_signal_anywhere_loses_nothing(
    tmp_path: Path,
    tiny_base: Path,
    rows_file: Path,
    whole: Any,
    hook: str,
    count: int,
    step: int,
) -> None:
    """``step``: the one that is saved. Three validations lie before the last; see ``history``."""
    assert stop(tmp_path, tiny_base, rows_file, SignalAt(hook, count)) == step
    run(tmp_path, tiny_base, rows_file, resume=True, checkpoint=RARELY)
    assert_same(tmp_path, whole())


def test_a_second_signal_while_leaving_changes_nothing(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """The first comes in micro-batch 7; the others while its state is saved, and after that."""
    step = stop(
        tmp_path,
        tiny_base,
        rows_file,
        SignalAt("on_train_batch_start", 7, signal.SIGUSR1),
        SignalAt("on_save_checkpoint", 2),  # after those of steps 1 and 5
        SignalAt("on_exception"),
    )
    assert step == 8


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_start", "on_train_start"])
def test_a_signal_before_training_ends_the_run_where_it_is(
    tmp_path: Path, tiny_base: Path, rows_file: Path, hook: str
) -> None:
    assert stop(tmp_path, tiny_base, rows_file, SignalAt(hook)) == -1


def test_samples_are_cut_short_and_asked_again(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """The signal comes before the last samples are drawn: their first token is their last."""

    def writer() -> SampleWriter:
        return SampleWriter(num_prompts=1, decoding=DecodingConfig(max_new_tokens=200))

    stop(tmp_path, tiny_base, rows_file, SignalAt("on_train_end"), writer(), max_epochs=1)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "adapter").exists()
    run(tmp_path, tiny_base, rows_file, resume=True, callbacks=[writer()], max_epochs=1)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "adapter").exists()
    assert is_complete(tmp_path)


class BrokenLoader(Callback):
    """Ends as torch does when a loader's process is told to end with its parent."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")


def test_a_loader_that_the_signal_ended_too_does_not_cost_the_save(
    tmp_path: Path, tiny_base: Path, rows_file: Path, whole: Any
) -> None:
    with pytest.raises(RuntimeError, match="killed by signal"):
        run(tmp_path, tiny_base, rows_file, checkpoint=RARELY, callbacks=[BrokenLoader()])
    newest = newest_verified(tmp_path)
    assert newest is not None
    assert step_of(newest) == 6
    run(tmp_path, tiny_base, rows_file, resume=True, checkpoint=RARELY)
    assert_same(tmp_path, whole())
