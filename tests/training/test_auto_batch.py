"""``data.batch_size: auto`` and ``model.gradient_checkpointing: auto`` on CPUs.

What is chosen is held against the run in which the same values are written down, byte for byte.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapter_runs import KillAt, Killed, digest, one_thread  # noqa: F401
from auto_runs import GIB, LARGE, ROWS_OF_A_STEP, RoomFor, auto_run
from gloo import run_processes
from launched import write_config
from typed import type_words

from qlora_pl.allocator import ALLOCATOR_VARIABLES
from qlora_pl.data.batches.global_batch import possible_sizes
from qlora_pl.data.batches.largest_batch import first_size, largest_batch
from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.planning.advice.automatic import USABLE, Choice, choices
from qlora_pl.training.memory.auto_batch import AutoBatch
from qlora_pl.training.memory.memory_record import FILE
from qlora_pl.training.memory.planned_memory import RunPlanner
from qlora_pl.training.run_folders.run_folder import newest_verified

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


def cut_of(module: Any) -> tuple[int, int]:
    trainer = module.trainer
    return trainer.datamodule.batch_size, trainer.accumulate_grad_batches


# -- what comes into question ----------------------------------------------------------------------


@pytest.mark.parametrize(("share", "sizes"), [(12, [12, 6, 4, 3, 2, 1]), (7, [7, 1]), (1, [1])])
def test_sizes_are_the_divisors_of_a_devices_share(share: int, sizes: list[int]) -> None:
    assert possible_sizes(share) == sizes
    assert choices("auto", True, share, 4, 64, True) == [Choice(size, True) for size in sizes]


def test_nothing_is_recomputed_for_more_than_five_hundred_tokens_at_a_time() -> None:
    """Rows of 200: three of them are not worth recomputing, two may be."""
    wanted = choices("auto", "auto", 12, 4, 200, True)
    assert wanted[:4] == [Choice(size, False) for size in (12, 6, 4, 3)]
    assert wanted[4:] == [Choice(size, True) for size in (12, 6, 4, 3, 2, 1)]
    assert choices("auto", "auto", 2, 4, 8, True)[0] == Choice(2, False)  # all that there is


def test_a_size_that_was_written_down_stays_and_a_family_that_cannot_recompute_does_not() -> None:
    assert choices(4, "auto", 16, 4, 64, True) == [Choice(4, False), Choice(4, True)]
    assert choices("auto", "auto", 2, 4, 64, False) == [Choice(2, False), Choice(1, False)]


@pytest.mark.parametrize(("total", "size"), [(None, 4), (16, 4), (6, 3), (7, 1), (1, 1)])
def test_until_it_is_settled_auto_is_a_size_that_divides(total: int | None, size: int) -> None:
    assert first_size("auto", total) == size
    assert first_size(5, total) == 5


# -- by the plan -----------------------------------------------------------------------------------


def test_all_memory_takes_the_whole_step_at_once(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    module = auto_run(tmp_path, tiny_base, rows_file, AutoBatch(LARGE))
    assert cut_of(module) == (ROWS_OF_A_STEP, 1)
    assert module.trainer.datamodule.eval_batch_size == ROWS_OF_A_STEP


@pytest.mark.parametrize("rows", [4, 2, 1])
def test_the_plan_takes_the_largest_that_fits_and_the_run_is_the_one_with_that_number(
    rows: int, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Source of the limit: the plan of the micro-batch itself, and of the next larger one."""
    written = auto_run(
        tmp_path / "written", tiny_base, rows_file, data={"batch_size": rows}, dropout=0.1
    )
    planner = RunPlanner(written.trainer, written)
    need, more = (
        planner.largest(size, False, ROWS_OF_A_STEP // size).before_overhead
        for size in (rows, 2 * rows)
    )
    assert need < more
    limit = (need + more) / 2 / USABLE / GIB
    chosen = auto_run(tmp_path / "chosen", tiny_base, rows_file, AutoBatch(limit), dropout=0.1)
    assert cut_of(chosen) == cut_of(written) == (rows, ROWS_OF_A_STEP // rows)
    assert digest(tmp_path / "chosen") == digest(tmp_path / "written")
    assert chosen.last_evaluation == written.last_evaluation


def test_recomputing_is_turned_on_only_where_it_has_to_be(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"data": {"batch_size": 8}, "gradient_checkpointing": "auto"}
    free = auto_run(tmp_path / "free", tiny_base, rows_file, AutoBatch(LARGE), **settings)
    planner = RunPlanner(free.trainer, free)
    off, on = (planner.largest(8, recomputes, 1).before_overhead for recomputes in (False, True))
    assert on < off
    tight = auto_run(
        tmp_path / "tight",
        tiny_base,
        rows_file,
        AutoBatch((on + off) / 2 / USABLE / GIB),
        **settings,
    )
    assert (free.gradient_checkpointing, tight.gradient_checkpointing) == (False, True)
    assert digest(tmp_path / "free") == digest(tmp_path / "tight")  # it computes the same


def test_what_cannot_fit_by_the_plan_is_said_and_tried_with_a_single_row(
    tiny_base: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "qlora_pl"):
        module = auto_run(tmp_path, tiny_base, rows_file, AutoBatch(1e-6))
    assert cut_of(module) == (1, ROWS_OF_A_STEP)
    assert "(92% of what is to be had); there is nothing smaller" in caplog.text


def test_the_largest_batch_is_as_wide_as_any_of_the_run(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Source: every micro-batch of two epochs, made."""
    module = auto_run(tmp_path, tiny_base, rows_file, AutoBatch(LARGE))
    data = module.trainer.datamodule
    batches = module.trainer.train_dataloader.dataset
    widest = max(
        batches[key]["input_ids"].shape[1] for epoch in (0, 1) for key in batches.keys(epoch)
    )
    assert largest_batch(data, 4)["input_ids"].shape == (4, widest)


# -- by trying -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 3, 1])
def test_a_real_pass_has_the_last_word(
    rows: int,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = max(size for size in (8, 4, 2, 1) if size <= rows)
    choice = RoomFor(rows)
    with caplog.at_level(logging.INFO, "qlora_pl"):
        chosen = auto_run(tmp_path / "chosen", tiny_base, rows_file, choice, dropout=0.1)
    auto_run(tmp_path / "written", tiny_base, rows_file, data={"batch_size": size}, dropout=0.1)
    assert [rows for rows, _ in choice.tried] == [n for n in (8, 4, 2, 1) if n >= size]
    assert cut_of(chosen) == (size, ROWS_OF_A_STEP // size)
    assert digest(tmp_path / "chosen") == digest(tmp_path / "written")
    assert ("did not fit when it was tried" in caplog.text) == (size < 8)


def test_recomputing_is_tried_after_all_that_do_without(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    choice = RoomFor(2)
    module = auto_run(
        tmp_path, tiny_base, rows_file, choice, gradient_checkpointing="auto", data={"seed": 1}
    )
    assert choice.tried == [(8, False), (8, True), (4, True), (2, True)]
    assert cut_of(module) == (2, 4)
    assert module.gradient_checkpointing is True


def test_no_room_for_one_row_is_a_sentence(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(HardwareError, match=r"single row of \d+ tokens; lower data.max_length"):
        auto_run(tmp_path, tiny_base, rows_file, RoomFor(0))


# -- goes on ---------------------------------------------------------------------------------------


def test_a_resumed_run_takes_the_recorded_size_whatever_is_free_then(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The first start had room for two rows only; the device is the same, so two it stays."""
    auto_run(tmp_path / "whole", tiny_base, rows_file, RoomFor(2), dropout=0.1)
    with pytest.raises(Killed):
        auto_run(tmp_path / "parts", tiny_base, rows_file, RoomFor(2), KillAt(2), dropout=0.1)
    choice = AutoBatch(LARGE, newest_verified(tmp_path / "parts"))
    module = auto_run(tmp_path / "parts", tiny_base, rows_file, choice, dropout=0.1)
    assert cut_of(module) == (2, 4)
    assert choice.choices[choice.number] == Choice(2, False)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_on_other_memory_a_resumed_run_chooses_anew_and_trains_on_the_same_rows(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        auto_run(tmp_path, tiny_base, rows_file, AutoBatch(1e-6), KillAt(2))
    choice = AutoBatch(LARGE, newest_verified(tmp_path))
    module = auto_run(tmp_path, tiny_base, rows_file, choice)
    assert cut_of(module) == (8, 1)
    assert module.trainer.global_step == 3


@pytest.mark.parametrize(
    ("memory_gib", "rows", "size"), [([LARGE, 1e-6], None, 1), ([LARGE, LARGE], [4, 2], 2)]
)
def test_two_processes_take_the_smaller_of_their_choices(
    memory_gib: list[float],
    rows: list[int] | None,
    size: int,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
) -> None:
    settings = {
        "folder": str(tmp_path),
        "base": str(tiny_base),
        "rows_file": str(rows_file),
        "memory_gib": memory_gib,
        "rows": rows,
    }
    run_processes(Path(__file__).parent.parent / "auto_runs.py", 2, settings)
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] == {"batch_size": size, "accumulation": ROWS_OF_A_STEP // 2 // size}


# -- as a user types it ----------------------------------------------------------------------------


def test_the_command_says_it_in_a_sentence_and_its_record_is_a_file_of_the_same_run(
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither batch nor accumulation is named: sixteen rows a step, as by default."""
    path = write_config(tmp_path, tiny_base, rows_file)
    config = yaml.safe_load(path.read_text())
    config["data"]["batch_size"] = "auto"
    config["model"]["gradient_checkpointing"] = "auto"
    config["trainer"] |= {"accumulate_grad_batches": None, "max_steps": 2}
    config["run"]["memory_gib"] = LARGE
    path.write_text(yaml.safe_dump(config))
    code, _, said = type_words(monkeypatch, capfd, "fit", "--config", path)
    assert code == 0, said
    sentence = (
        "data.batch_size: 16, trainer.accumulate_grad_batches: 1, model.gradient_checkpointing: "
        "false (auto), planned to take "
    )
    assert caplog.text.count(sentence) == 1
    first = tmp_path / "runs" / "launched" / "version_0"
    record = yaml.safe_load((first / "run.yaml").read_text())
    assert record["data"]["batch_size"] == 16
    assert record["trainer"]["accumulate_grad_batches"] == 1
    assert record["model"]["gradient_checkpointing"] is False
    assert len((tmp_path / "runs" / FILE).read_text().splitlines()) == 2
    known = {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}
    assert json.loads((first / "environment.json").read_text())["allocator"] == known != {}
    code, _, said = type_words(monkeypatch, capfd, "fit", "--config", first / "run.yaml")
    assert code == 0, said
    assert digest(first) == digest(first.with_name("version_1"))
    caplog.clear()
    on = ("--ckpt_path", first / "checkpoints" / "step-00000002.ckpt", "--trainer.max_steps", 3)
    code, _, said = type_words(monkeypatch, capfd, "fit", "--config", path, *on)
    assert code == 0, said
    assert "false (auto), as before the checkpoint." in caplog.text


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "accumulation": (
        {"trainer.accumulate_grad_batches": 4},
        "trainer.accumulate_grad_batches: 4 contradicts data.batch_size: auto, which chooses both; "
        "remove it, and set data.global_batch_size to the rows of a step.",
    ),
    "mean of means": (
        {"model.normalize_loss_by": "micro_batches"},
        "data.batch_size: auto would change the loss, which model.normalize_loss_by: micro_batches "
        "makes depend on it; write a number, or normalise by tokens or rows.",
    ),
    "interval": (
        {"trainer.val_check_interval": 2},
        "trainer.val_check_interval: 2 counts batches, whose size data.batch_size: auto leaves "
        "open; write a share such as 0.5, or a number for data.batch_size.",
    ),
    "limit": (
        {"trainer.limit_val_batches": 3},
        "trainer.limit_val_batches: 3 counts batches, whose size data.batch_size: auto leaves "
        "open; write a share such as 0.5, or a number for data.eval_batch_size.",
    ),
    "budget": (
        {"data.tokens_per_batch": 512},
        "data.batch_size: auto counts rows, and tokens_per_batch tokens; leave out one of the two.",
    ),
    "packing": (
        {"data.packing": "auto"},
        "data.batch_size: auto is chosen for rows that are packed or not; with it, set packing to "
        "true or false.",
    ),
    "memory": ({"run.memory_gib": 0}, "run.memory_gib: must be above 0, got 0.0."),
    "word": (
        {"data.batch_size": "largest"},
        "data.batch_size: expected a whole number or auto, got 'largest'.",
    ),
    "checkpointing": (
        {"model.gradient_checkpointing": "sometimes"},
        "model.gradient_checkpointing: expected true or false or auto, got 'sometimes'.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_auto_cannot_go_with_is_a_sentence(
    name: str, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    flags, sentence = BAD[name]
    words = ["fit", "--model.model_name_or_path", tiny_base, "--data.sources", rows_file]
    for key, value in ({"data.batch_size": "auto"} | flags).items():
        words += [f"--{key}", value]
    code, _, said = type_words(monkeypatch, capfd, *words, "--model.lora.r", 4)
    assert (code, said.strip()) == (2, f"qlora-pl: {sentence}")


def test_without_the_callback_auto_is_refused(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="settled by the callback AutoBatch"):
        auto_run(tmp_path, tiny_base, rows_file)


def test_an_accumulation_of_its_own_is_refused_in_python_too(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"contradicts data\.batch_size: auto"):
        auto_run(
            tmp_path,
            tiny_base,
            rows_file,
            AutoBatch(LARGE),
            trainer={"accumulate_grad_batches": 2},
        )


def test_a_run_without_auto_is_left_alone(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    choice = AutoBatch(LARGE)
    module = auto_run(tmp_path, tiny_base, rows_file, choice, data={"batch_size": 2})
    assert choice.choices == []
    assert choice.state_dict() == {}
    assert module.after_loading is None


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_gradients_and_random_numbers_are_left_as_they_were(
    padding: str, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """A trial draws dropout masks and makes gradients; nothing of either is there afterwards."""
    seen: dict[str, Any] = {}

    class Watch(RoomFor):
        def _settle(self) -> None:
            before = torch.get_rng_state()
            super()._settle()
            seen["same"] = torch.equal(before, torch.get_rng_state())
            tensors = self._module.trained_tensors().values()
            seen["gradients"] = [p.grad for p in tensors if p.grad is not None]

    auto_run(tmp_path, tiny_base, rows_file, Watch(4), data={"padding": padding}, dropout=0.1)
    assert seen == {"same": True, "gradients": []}
