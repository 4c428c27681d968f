"""One batch, cut in other ways: what is left to accumulate, and where a run goes on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer

from qlora_pl.__main__ import main
from qlora_pl.batch import FILLER_ROW
from qlora_pl.cli import read_runs
from qlora_pl.data.batches.batching import EvaluationBatches, PromptBatches
from qlora_pl.data.batches.global_batch import accumulation_of
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.errors import CheckpointError, ConfigurationError
from qlora_pl.inspection.data.first_batch import first_batch, picture
from qlora_pl.inspection.data.run_data import read_run
from qlora_pl.training.trainer_settings import RunTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*")
]  # Lightning has something to say of each trainer

ROWS = [{"prompt": f"Question {n}?", "response": "7" * (1 + n * n % 29)} for n in range(37)]
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


def is_whole(global_batch: int, batch: int, devices: int) -> bool:
    return global_batch % (batch * devices) == 0


# -- the arithmetic ------------------------------------------------------------------------------


def test_micro_batches_devices_and_accumulation_make_the_global_batch() -> None:
    """Every combination of small numbers, by multiplication; the others are refused."""
    for whole, batch, devices in product(range(1, 25), range(1, 9), range(1, 6)):
        if is_whole(whole, batch, devices):
            assert accumulation_of(whole, batch, devices) * batch * devices == whole
        else:
            with pytest.raises(ConfigurationError):
                accumulation_of(whole, batch, devices)


def test_what_the_refusal_proposes_works_and_nothing_nearer_does() -> None:
    """Each number it names is put in the place of the one it stands for."""
    for whole, batch, devices in product(range(1, 25), range(1, 9), range(1, 6)):
        if is_whole(whole, batch, devices):
            continue
        with pytest.raises(ConfigurationError) as caught:
            accumulation_of(whole, batch, devices)
        sentence = str(caught.value).rpartition(":")[2]
        named = {
            "global": numbers(r"global_batch_size ([\d or]+)", sentence),
            "batch": numbers(r"data\.batch_size ([\d or]+)", sentence),
            "devices": numbers(r"([\d or]+) devices in all", sentence),
        }
        works = {
            "global": lambda n, b=batch, d=devices: is_whole(n, b, d),
            "batch": lambda n, w=whole, d=devices: is_whole(w, n, d),
            "devices": lambda n, w=whole, b=batch: is_whole(w, b, n),
        }
        near = {"global": whole, "batch": batch, "devices": devices}
        for name, value in near.items():
            below = [n for n in range(1, value) if works[name](n)][-1:]
            above = [n for n in range(value + 1, 60) if works[name](n)][:1]
            assert named[name] == below + above, (whole, batch, devices, sentence)


def numbers(pattern: str, sentence: str) -> list[int]:
    found = re.search(pattern, sentence)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            (16, 3, 2),
            "data.global_batch_size: 16 rows in micro-batches of 3 cannot be shared out evenly on "
            "2 devices; the nearest that can: data.global_batch_size 12 or 18, or data.batch_size "
            "2 or 4.",
        ),
        (
            (16, 4, 3, "packs"),
            "data.global_batch_size: 16 packs in micro-batches of 4 cannot be shared out evenly on "
            "3 devices; the nearest that can: data.global_batch_size 12 or 24, or 2 or 4 devices "
            "in all.",
        ),
        (
            (2, None, 4),
            "data.global_batch_size: 2 micro-batches cannot be shared out evenly on 4 devices; the "
            "nearest that can: data.global_batch_size 4, or 2 devices in all.",
        ),
        (
            (3, 4, 1),
            "data.global_batch_size: 3 rows in micro-batches of 4 cannot be shared out evenly on "
            "1 device; the nearest that can: data.global_batch_size 4, or data.batch_size 3.",
        ),
    ],
    ids=["rows", "packs", "micro-batches", "one device"],
)
def test_the_refusal_is_one_sentence(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        accumulation_of(*arguments)
    assert str(caught.value) == sentence


# -- the trainer ---------------------------------------------------------------------------------


@pytest.fixture
def make(tiny_base: Path) -> Callable[..., InstructionDataModule]:
    """A data module over a few rows in memory."""

    def data(sources: Any = ROWS, **settings: Any) -> InstructionDataModule:
        settings = {"tokenizer": str(tiny_base), "batch_size": 2, "val_size": 5} | settings
        return InstructionDataModule(sources, **settings)

    return data


@pytest.mark.parametrize(("devices", "accumulation"), [(1, 6), (2, 3), (3, 2), (6, 1)])
@pytest.mark.parametrize("kind", [Trainer, RunTrainer])
def test_the_trainer_accumulates_what_its_devices_leave(
    make: Callable[..., InstructionDataModule], kind: Any, devices: int, accumulation: int
) -> None:
    """Lightning's own world size, known before a process is started."""
    data = make(global_batch_size=12)
    trainer = data.trainer = kind(devices=devices, **QUIET)
    data.setup("fit")
    assert trainer.world_size == devices
    assert trainer.accumulate_grad_batches == accumulation
    assert data.describe()["global_batch_size"] == 12


def test_without_a_global_batch_the_trainer_keeps_its_accumulation(
    make: Callable[..., InstructionDataModule],
) -> None:
    data = make()
    trainer = data.trainer = Trainer(devices=2, accumulate_grad_batches=5, **QUIET)
    data.setup("fit")
    assert trainer.accumulate_grad_batches == 5
    assert data.describe()["global_batch_size"] == 20


@pytest.mark.parametrize("kind", [Trainer, RunTrainer])
def test_an_accumulation_that_contradicts_the_global_batch_is_refused(
    make: Callable[..., InstructionDataModule], kind: Any
) -> None:
    data = make(global_batch_size=12)
    data.trainer = kind(devices=2, accumulate_grad_batches=4, **QUIET)
    with pytest.raises(ConfigurationError) as caught:
        data.setup("fit")
    assert str(caught.value) == (
        "trainer.accumulate_grad_batches: 4 contradicts data.global_batch_size 12, which is 3 "
        "micro-batches of 2 on 2 devices; remove one of the two."
    )
    data.trainer = kind(devices=2, accumulate_grad_batches=3, **QUIET)
    data.setup("fit")


def test_an_accumulation_of_one_counts_where_somebody_wrote_it(
    make: Callable[..., InstructionDataModule],
) -> None:
    """Lightning's own trainer has 1 as its default, so only ``RunTrainer`` can tell."""
    data = make(global_batch_size=12)
    data.trainer = RunTrainer(devices=1, accumulate_grad_batches=1, **QUIET)
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches: 1 contradicts"):
        data.setup("fit")


def test_commands_that_do_not_train_take_any_number_of_devices(
    make: Callable[..., InstructionDataModule],
) -> None:
    data = make(global_batch_size=16)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=3, accumulate_grad_batches=1, lightning_module=None
    )
    for stage in ("validate", "predict"):
        data.setup(stage)
    with pytest.raises(ConfigurationError, match="on 3 devices"):
        data.setup("fit")


# -- the command line ----------------------------------------------------------------------------


def words(base: Path, rows: Path, *more: str) -> list[str]:
    return [
        *("--model.model_name_or_path", str(base), "--model.lora.r", "4"),
        *("--data.sources", str(rows), "--data.val_size", "2", *more),
    ]


@pytest.mark.parametrize(
    ("flags", "accumulation"),
    [
        ([], 4),
        (["--trainer.accumulate_grad_batches", "2"], 2),
        (["--data.global_batch_size", "8"], None),
        (["--data.global_batch_size", "8", "--trainer.accumulate_grad_batches", "null"], None),
    ],
)
def test_the_default_accumulation_gives_way_to_a_global_batch(
    tiny_base: Path, rows_file: Path, flags: list[str], accumulation: int | None
) -> None:
    (run,) = read_runs([words(tiny_base, rows_file, *flags)])
    assert run.trainer.accumulate_grad_batches == accumulation


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--trainer.accumulate_grad_batches", "4"],
            "trainer.accumulate_grad_batches: 4 contradicts data.global_batch_size 8, which is 2 "
            "micro-batches of 4 on 1 device; remove one of the two.",
        ),
        (
            ["--trainer.devices", "3"],
            "data.global_batch_size: 8 rows in micro-batches of 4 cannot be shared out evenly on 3 "
            "devices; the nearest that can: data.global_batch_size 12, or 2 devices in all.",
        ),
    ],
)
def test_a_batch_that_does_not_come_out_even_ends_the_command_before_anything_starts(
    tmp_path: Path,
    tiny_base: Path,
    rows_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    sentence: str,
) -> None:
    """Even with three devices: the children would be started after this."""
    monkeypatch.chdir(tmp_path)
    more = ["--data.global_batch_size", "8", "--trainer.accelerator", "cpu", *flags]
    monkeypatch.setattr(sys, "argv", ["qlora-pl", "fit", *words(tiny_base, rows_file, *more)])
    assert main() == 2
    assert capsys.readouterr().err.strip() == f"qlora-pl: {sentence}"
    assert list(tmp_path.glob("runs/*/*")) == []


def test_the_page_shows_the_batch_that_a_device_of_several_is_given_first(
    make: Callable[..., InstructionDataModule], tiny_base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    more = ["--data.global_batch_size", "12", "--data.batch_size", "2", "--data.seed", "3"]
    looked_at = first_batch(read_run(words(tiny_base, path, *more)).data)
    data = make(str(path), global_batch_size=12, val_size=2, seed=3)
    data.trainer = Trainer(devices=3, **QUIET)
    data.setup("fit")
    loader: Any = data.train_dataloader()
    assert looked_at == picture(loader.dataset[next(iter(loader.sampler))])


# -- going on in another layout ------------------------------------------------------------------


def on_device(data: InstructionDataModule, rank: int, world_size: int, accumulation: int) -> Any:
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world_size,
        global_rank=rank,
        accumulate_grad_batches=accumulation,
        lightning_module=None,
        state=SimpleNamespace(fn="fit"),
    )
    return data


LAYOUTS = {  # (micro-batch, accumulation, devices)
    "padded": ({}, [(12, 1, 1), (2, 6, 1), (2, 3, 2), (1, 4, 3), (2, 1, 6)]),
    "packed": ({"packing": True, "max_length": 96}, [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4)]),
    "token budget": ({"tokens_per_batch": 72, "max_length": 64}, [(2, 4, 1), (2, 2, 2), (3, 1, 4)]),
}


@pytest.mark.parametrize("shape", LAYOUTS)
def test_every_layout_goes_on_with_the_same_steps_from_every_point(
    make: Callable[..., InstructionDataModule], shape: str
) -> None:
    """From each layout to each other, after every step of an epoch; rows over all devices."""
    settings, layouts = LAYOUTS[shape]
    made = {layout: devices(make, layout, settings) for layout in layouts}
    whole = {layout: steps(parts, layout[1]) for layout, parts in made.items()}
    expected = whole[layouts[0]]
    assert len(expected) > 2
    assert all(found == expected for found in whole.values())
    for old, new in product(layouts, repeat=2):
        for step in range(1, len(expected)):
            for part in made[new]:
                part.resume_from(made[old][0].describe(), 0, step * old[1])
            assert steps(made[new], new[1]) == expected[step:]
            for part in made[new]:
                part.setup("fit")  # back to the beginning


def devices(make: Any, layout: tuple[int, int, int], settings: dict[str, Any]) -> list[Any]:
    batch_size, accumulation, world_size = layout
    parts = [
        on_device(make(batch_size=batch_size, seed=3, **settings), rank, world_size, accumulation)
        for rank in range(world_size)
    ]
    for part in parts:
        part.setup("fit")
    return parts


def steps(parts: list[Any], accumulation: int) -> list[list[int]]:
    """The rows of each step that is left, over all devices; all have equally many micro-batches."""
    loaders = [part.train_dataloader() for part in parts]
    found: list[list[int]] = []
    for number, batches in enumerate(zip(*loaders, strict=True)):
        if number % accumulation == 0:
            found.append([])
        ids = np.concatenate([batch["row_ids"].numpy() for batch in batches])
        found[-1] += ids[ids != FILLER_ROW].tolist()
    return [sorted(rows) for rows in found]


def test_what_changes_the_rows_of_a_step_is_still_refused(
    make: Callable[..., InstructionDataModule],
) -> None:
    def made(layout: tuple[int, int, int], **settings: Any) -> Any:
        return devices(make, layout, settings)[0]

    saved = made((2, 6, 1)).describe()
    with pytest.raises(CheckpointError, match=r"data.global_batch_size\): it had 12, this run has"):
        made((2, 6, 2)).resume_from(saved, 0, 6)
    saved = made((2, 4, 1), tokens_per_batch=512).describe()
    with pytest.raises(CheckpointError, match=r"tokens_per_batch: it had 512, this run has 600"):
        made((2, 4, 1), tokens_per_batch=600).resume_from(saved, 0, 4)


def test_a_position_within_a_step_goes_on_in_its_own_layout_alone(
    make: Callable[..., InstructionDataModule],
) -> None:
    saved = devices(make, (2, 6, 1), {})[0].describe()
    same, other = devices(make, (2, 6, 1), {})[0], devices(make, (2, 3, 2), {})[0]
    assert same.resume_from(saved, 0, 8) == 8
    with pytest.raises(CheckpointError, match="2 micro-batches into a step of 6"):
        other.resume_from(saved, 0, 8)


# -- devices with unequal numbers of rows --------------------------------------------------------


@pytest.mark.parametrize("num_val", range(1, 9))
def test_three_devices_evaluate_every_row_once_in_equally_many_batches(
    make: Callable[..., InstructionDataModule], num_val: int
) -> None:
    parts = devices(make, (2, 2, 3), {"val_size": num_val, "eval_batch_size": 2})
    for name, kind in (("val", EvaluationBatches), ("predict", PromptBatches)):
        loaders = [getattr(part, f"{name}_dataloader")() for part in parts]
        assert all(isinstance(loader.dataset, kind) for loader in loaders)
        shares = [[ids for batch in each for ids in batch["row_ids"].tolist()] for each in loaders]
        assert len({len(loader) for loader in loaders}) == 1
        rows = [row for share in shares for row in share if row != FILLER_ROW]
        assert sorted(rows) == list(range(num_val))
