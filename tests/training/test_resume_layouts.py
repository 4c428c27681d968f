"""A run goes on with other devices and other micro-batches: the same rows, and the same result.

Dropout is 0 throughout: its masks are drawn by each device for its own rows.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_runs import one_thread  # noqa: F401 (used by pytest)
from layout_runs import rows_of_steps, run, run_on
from safetensors.torch import load_file

from qlora_pl.errors import CheckpointError
from qlora_pl.training.checkpoints.random_state import collect_random_states
from qlora_pl.training.checkpoints.resuming import random_states_of

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

TOLERANCE = 2.0e-4
"""Largest difference of a trained weight, of which the steps are 1e-2 each.

Layouts add the same numbers in other groups (float32: 6e-8 of each sum) and pad to other widths;
Adam divides by the root of a gradient's mean square, so that a weight whose gradient is nearly
nothing moves by more. Measured: 2.5e-7 over twelve padded steps, 3.2e-5 over the packed ones.
"""
SHAPES: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "global_batch_size": 2},
    "window": {"window": 7},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 rows of which two validate: five steps of four rows in an epoch, and one of two."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {
            "prompt": "How many?" + " Or so?" * (n % 3),
            "response": "It is " + "so " * (n % 5) + f"{n}.",
        }
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def settings(tiny_base: Path, rows: str) -> Callable[..., dict[str, Any]]:
    """What ``layout_runs.run`` takes."""

    def of(folder: Path, shape: str = "padded", batch_size: int = 2, **more: Any) -> dict[str, Any]:
        data = SHAPES[shape] | {"batch_size": batch_size}
        limit = {"max_epochs": None, "max_steps": 9} if shape == "window" else {"max_epochs": 2}
        given = {"base": str(tiny_base), "rows": rows, "folder": str(folder), "data": data}
        return given | {"trainer": limit | more.pop("trainer", {})} | more

    return of


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., dict[str, Any]]
) -> Callable[[str], Path]:
    """One uninterrupted run of each shape, on one device."""
    made: dict[str, Path] = {}

    def get(shape: str) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp("whole") / "run"
            run(settings(made[shape], shape))
        return made[shape]

    return get


def history(folder: Path) -> dict[int, dict[str, float]]:
    """Every row of metrics.csv by its step; no step may stand there twice."""
    with (folder / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = {
        int(line["step"]): {name: float(value) for name, value in line.items() if value}
        for line in lines
    }
    assert len(found) == len(lines)
    return found


def assert_same_run(folder: Path, whole: Path) -> None:
    """Rows, table, best step, counts and weights."""
    assert rows_of_steps(folder) == rows_of_steps(whole)
    ours, expected = history(folder), history(whole)
    assert ours.keys() == expected.keys()
    for step, line in expected.items():
        for name in ("train/loss", "optim/lr", "optim/grad_norm", "val/loss"):
            assert (name in ours[step]) == (name in line)
            if name in line:
                assert ours[step][name] == pytest.approx(line[name], rel=1e-4), (step, name)
    kept = [json.loads((f / "checkpoints/kept.json").read_text()) for f in (folder, whole)]
    assert kept[0]["steps"] == kept[1]["steps"]
    assert kept[0]["best_step"] == kept[1]["best_step"]
    metrics = [json.loads((f / "metrics.json").read_text()) for f in (folder, whole)]
    for name in ("step", "rows", "tokens", "trained_tokens", "is_complete"):
        assert metrics[0][name] == metrics[1][name], name
    assert largest_difference(folder, whole) <= TOLERANCE


def largest_difference(folder: Path, whole: Path) -> float:
    ours, expected = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder, whole))
    assert ours.keys() == expected.keys()
    return max(float((ours[name] - expected[name]).abs().max()) for name in ours)


# -- in one process: micro-batch and accumulation -------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kill_at", "sizes"),
    [
        ("padded", 3, (2, 1)),
        ("packed", 2, (1, 2)),
        ("window", 3, (2, 4)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("padded", 4, (1, 4)),
                ("padded", 7, (4, 1)),  # right after the epoch's last, smaller step
                ("padded", 9, (4, 2)),
                ("packed", 3, (2, 1)),
                ("window", 4, (1, 2)),
            ]
        ),
    ],
)
def test_a_run_goes_on_with_other_micro_batches(
    tmp_path: Path,
    settings: Callable[..., dict[str, Any]],
    whole: Callable[[str], Path],
    shape: str,
    kill_at: int,
    sizes: tuple[int, int],
) -> None:
    run_on(1, settings(tmp_path, shape, sizes[0], kill_at=kill_at))
    trainer = run(settings(tmp_path, shape, sizes[1]))
    assert trainer.accumulate_grad_batches == trainer.datamodule.global_batch_size // sizes[1]  # type: ignore[attr-defined]
    assert_same_run(tmp_path, whole(shape))


def test_validations_are_counted_as_if_the_run_had_always_been_cut_so(
    tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    """Every 7 micro-batches across epochs of 22, of one row each: after 7, 14, 21, 28, 35, 42."""
    interval = {"val_check_interval": 7, "check_val_every_n_epoch": None}
    run(settings(tmp_path / "whole", batch_size=1, trainer=interval))
    run_on(1, settings(tmp_path / "run", batch_size=4, kill_at=8, trainer=interval))
    run(settings(tmp_path / "run", batch_size=1, trainer=interval))
    validated = [
        {step for step, line in history(tmp_path / name).items() if "val/loss" in line and step > 8}
        for name in ("run", "whole")
    ]
    assert validated[0] == validated[1]
    assert len(validated[0]) > 2


def test_where_micro_batches_weigh_the_same_their_size_stays(
    tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    mean = {"module": {"normalize_loss_by": "micro_batches"}}
    run_on(1, settings(tmp_path, kill_at=3, **mean))
    with pytest.raises(CheckpointError, match=r"data\.batch_size=2, this run has 1, and"):
        run(settings(tmp_path, batch_size=1, **mean))


def test_the_layout_of_the_checkpoint_goes_on_in_the_same_bytes(
    tmp_path: Path, settings: Callable[..., dict[str, Any]], whole: Callable[[str], Path]
) -> None:
    run_on(1, settings(tmp_path, kill_at=4))
    run(settings(tmp_path))
    assert largest_difference(tmp_path, whole("padded")) == 0


# -- over processes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kill_at", "devices", "sizes"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("padded", 3, (2, 1), (1, 2)),
                ("padded", 3, (1, 2), (4, 2)),
                ("padded", 7, (2, 1), (2, 4)),
                ("padded", 7, (1, 2), (2, 1)),
                ("packed", 2, (2, 1), (1, 1)),
                ("packed", 3, (1, 2), (2, 1)),
                ("window", 3, (2, 1), (1, 4)),
                ("window", 4, (1, 2), (4, 1)),
            ]
        ),
    ],
)
def test_a_run_goes_on_with_another_number_of_devices(
    tmp_path: Path,
    settings: Callable[..., dict[str, Any]],
    whole: Callable[[str], Path],
    shape: str,
    kill_at: int,
    devices: tuple[int, int],
    sizes: tuple[int, int],
) -> None:
    run_on(devices[0], settings(tmp_path, shape, sizes[0], kill_at=kill_at))
    run_on(devices[1], settings(tmp_path, shape, sizes[1]))
    assert_same_run(tmp_path, whole(shape))


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "sizes"), [((2, 1), (1, 4)), ((1, 2), (4, 2))])
def test_a_run_goes_on_under_fsdp2_and_from_it(
    tmp_path: Path,
    settings: Callable[..., dict[str, Any]],
    whole: Callable[[str], Path],
    devices: tuple[int, int],
    sizes: tuple[int, int],
) -> None:
    """Checkpoints hold full tensors by name; a step's rows are the same on any strategy."""
    given = [settings(tmp_path, batch_size=size, strategy="fsdp2") for size in sizes]
    run_on(devices[0], given[0] | {"kill_at": 3})
    run_on(devices[1], given[1])
    assert_same_run(tmp_path, whole("padded"))


@pytest.mark.slow
def test_a_token_budget_goes_on_with_another_number_of_devices(
    tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    """Four micro-batches of 128 tokens are a step: 4 on one device, or 2 on each of two."""
    budget = {"tokens_per_batch": 128, "val_size": 2, "max_length": 64, "global_batch_size": 4}
    given = settings(tmp_path / "whole") | {"data": budget}
    run(given)
    run_on(2, given | {"folder": str(tmp_path / "run"), "kill_at": 2})
    run_on(1, given | {"folder": str(tmp_path / "run")})
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_three_devices_do_equally_many_micro_batches_and_the_steps_of_one(
    tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    """22 rows in steps of six: the last has four rows, one of three devices two fillers."""
    given = settings(tmp_path / "whole", batch_size=1)
    given["data"] |= {"global_batch_size": 6}
    run(given)
    run_on(3, given | {"folder": str(tmp_path / "three")})
    assert_same_run(tmp_path / "three", tmp_path / "whole")
    done = [path.read_text().splitlines() for path in sorted((tmp_path / "three").glob("rows-*"))]
    counts = [[json.loads(line)["micro_batches"] for line in lines] for lines in done]
    assert counts == 3 * [2 * [2, 2, 2, 2]]


def test_a_device_that_the_checkpoint_did_not_have_draws_its_own_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By rank and step from the run's seed; the seed itself stays."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    saved = [collect_random_states()]

    def drawn(rank: int, step: int) -> Any:
        trainer: Any = SimpleNamespace(global_rank=rank, global_step=step)
        return random_states_of(saved, trainer)["torch"]

    assert drawn(0, 3) is saved[0]["torch"]
    states = [drawn(1, 3), drawn(2, 3), drawn(1, 4)]
    assert torch.equal(states[0], drawn(1, 3))
    for number, state in enumerate(states):
        assert not any(torch.equal(state, other) for other in states[:number])
        assert not torch.equal(state, saved[0]["torch"])
    assert os.environ["PL_GLOBAL_SEED"] == "7"
