"""Whole commands in processes of their own, as a user types them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
import yaml

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Path:
    """A folder with an experiment file in it."""
    folder = tmp_path_factory.mktemp("workplace")
    experiment = {
        "seed_everything": 3,
        "model": {
            "model_name_or_path": str(tiny_base),
            "lora": {"r": 4, "dropout": 0.1},
            "optimizer": {"lr": 1.0e-2},
            "gradient_checkpointing": False,
        },
        "data": {
            "sources": [{"path": str(rows_file)}],
            "template": "guanaco",
            "val_size": 2,
            "batch_size": 2,
        },
        "samples": {"num_prompts": 1, "decoding": {"max_new_tokens": 4}},
        "checkpoint": {"every_n_steps": 1},
        "trainer": {
            "max_epochs": 2,
            "accumulate_grad_batches": 4,
            "val_check_interval": 4,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "accelerator": "cpu",
            "devices": 1,
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    return folder


def fit(
    workplace: Path,
    name: str,
    kill_at: int | None = None,
    *words: str,
    number: int = signal.SIGKILL,
    is_fresh: bool = True,
) -> Any:
    """Run the command line in the workplace; not fresh: in a process that has imported it."""
    words = ("fit", "--config", "tiny.yaml", "--run.name", name, *words)
    if kill_at is not None:
        settings = {"micro_batch": kill_at, "number": int(number)}
        callback = {"class_path": "killing.KillAt", "init_args": settings}
        words += ("--trainer.callbacks+", json.dumps(callback))
    environment = {"PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"}
    if not is_fresh:
        (ended,) = warm.run("qlora_pl", *words, environments=[environment], folder=workplace)
        return ended
    return subprocess.run(
        [sys.executable, "-m", "qlora_pl", *words],
        cwd=workplace,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        # A shell that puts the tests into the background has all of them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def history(run: Path) -> list[tuple[str, ...]]:
    """What metrics.csv says of each step, without timings."""
    with (run / "metrics.csv").open() as file:
        names = ("step", "train/loss", "optim/lr", "optim/grad_norm", "val/loss")
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


def events(run: Path, tag: str) -> list[tuple[int, float]]:
    """A curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run), purge_orphaned_data=True)
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


@pytest.mark.slow
def test_a_run_killed_four_times_ends_as_the_uninterrupted_one(workplace: Path) -> None:
    """Ten micro-batches an epoch in steps of 4, 4 and 2, with validations after 4, 8, 14 and 18.

    Killed in the second window; again in the first window after the resume; after the last step
    of the epoch; and after a step with a validation.
    """
    done = fit(workplace, "whole")
    assert done.returncode == 0, done.stderr
    kills = [6, 5, 10, 14]
    for number, kill_at in enumerate(kills):
        words = ("--ckpt_path", "last") if number else ()
        killed = fit(workplace, "killed", kill_at, *words)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = fit(workplace, "killed", None, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in (workplace / "runs/killed").iterdir()] == ["version_0"]

    one, other = workplace / "runs/whole/version_0", workplace / "runs/killed/version_0"
    adapters = [run / "adapter/adapter_model.safetensors" for run in (one, other)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert history(one) == history(other)
    assert [row[0] for row in history(one)] == [str(step) for step in range(7)]
    for tag in ("train/loss", "val/loss"):
        assert events(one, tag) == events(other, tag)
    kept = [(run / "checkpoints/kept.json").read_text() for run in (one, other)]
    assert kept[0] == kept[1]
    assert not list(other.rglob("hparams.yaml")), "an empty file beside run.yaml"
    assert "resuming " in resumed.stderr
    assert "version_0/checkpoints/step-00000003.ckpt at step 3" in resumed.stderr
    assert len(list(other.glob("run-resumed-*.yaml"))) == 4

    # Resuming what is complete says so and writes nothing.
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    again = fit(workplace, "killed", None, "--ckpt_path", "last")
    assert again.returncode == 0
    assert "complete" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in other.rglob("*")}


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_says_where_it_can_be_continued(
    workplace: Path, number: int, exit_code: int
) -> None:
    """The shell's codes: 128 and the signal's number. Micro-batch 6 lies in the second step."""
    name = f"stopped-{exit_code}"
    stopped = fit(workplace, name, 6, number=number)
    assert stopped.returncode == exit_code, stopped.stderr
    assert "Traceback" not in stopped.stderr
    last = stopped.stderr.strip().splitlines()[-1]
    assert last == "qlora-pl: Stopped at step 1; continue with --ckpt_path last."
    assert not (workplace / "runs" / name / "version_0/metrics.json").exists()


def test_a_run_that_is_told_to_stop_before_its_first_step_leaves_nothing(workplace: Path) -> None:
    stopped = fit(workplace, "early", 0, number=signal.SIGTERM, is_fresh=False)
    assert stopped.returncode == 143, stopped.stderr
    last = stopped.stderr.strip().splitlines()[-1]
    assert last == "qlora-pl: Stopped before the first checkpoint."
    assert not list((workplace / "runs/early").iterdir())
