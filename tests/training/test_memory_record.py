"""Memory as it was planned, beside what it came to; and that no run ends or changes by it."""

from __future__ import annotations

import csv
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from adapter_runs import digest, one_thread  # noqa: F401
from memory_runs import train

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import append_row
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.training.memory import memory_record
from qlora_pl.training.memory.memory_record import COLUMNS, COUNTED, FILE, MemoryRecord

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / FILE).open(newline="") as file:
        return list(csv.DictReader(file))


SETTINGS: dict[str, dict[str, Any]] = {
    "double quantisation, dropout": {"dropout": 0.1},
    "bfloat16 adapters": {"lora": LoRAConfig(r=8, dtype="bfloat16")},
    "8-bit optimizer": {"optimizer": OptimizerConfig(name="adamw_8bit")},
    "paged optimizer": {"optimizer": OptimizerConfig(name="paged_adamw_32bit")},
    "torch's optimizer": {"optimizer": OptimizerConfig(name="adamw_torch")},
    "16 bits": {
        "quantization": QuantizationConfig(quant_type="none", compute_dtype="bfloat16"),
        "gradient_checkpointing": True,
    },
    "int8": {"quantization": QuantizationConfig(quant_type="int8", compute_dtype="float32")},
    "one scale a block": {
        "quantization": QuantizationConfig(double_quant=False, compute_dtype="float32")
    },
    "every weight": {
        "quantization": QuantizationConfig(quant_type="none", compute_dtype="float32"),
        "lora": LoRAConfig(method="none"),
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_can_be_counted_is_what_was_planned_to_the_byte(
    name: str, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Source: the sizes of the tensors that the run holds after its first step."""
    record = MemoryRecord(tmp_path)
    train(tmp_path / "run", tiny_base, rows_file, record, **SETTINGS[name])
    (row,) = rows_of(tmp_path)
    planned = {part: int(row[f"planned_{part}"]) for part in COUNTED if part != "gradients"}
    assert {part: int(row[f"counted_{part}"]) for part in planned} == planned
    assert int(row["counted_gradients"]) == record.planned["gradients"] > 0
    assert row["peak_allocated"] == row["error_ratio"] == ""  # a CPU does not count it
    assert row["run"] == str(tmp_path / "run")
    if name != "every weight":
        assert planned["adapters"] > 0


def test_the_run_is_byte_for_byte_the_one_without(
    tiny_base: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "plain", tiny_base, rows_file, dropout=0.1)
    with caplog.at_level(logging.INFO, "qlora_pl"):
        train(tmp_path / "ours", tiny_base, rows_file, MemoryRecord(tmp_path), dropout=0.1)
    assert digest(tmp_path / "ours") == digest(tmp_path / "plain")
    assert caplog.text.count("memory, planned/counted in MiB: packed weights ") == 1


def test_each_start_adds_one_line(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    for steps in (1, 2):
        trainer = {"max_steps": steps}
        train(tmp_path / "run", tiny_base, rows_file, MemoryRecord(tmp_path), trainer=trainer)
    rows = rows_of(tmp_path)
    assert len(rows) == 2
    assert all(int(row["counted_gradients"]) for row in rows)  # of the resumed run, too


def _fail(*_: Any) -> None:
    raise ZeroDivisionError("nothing to divide by")


@pytest.mark.parametrize("part", ["RunPlanner", "held_by_model", "append_row"])
def test_a_run_does_not_end_by_what_goes_wrong_in_it(
    part: str,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(memory_record, part, _fail)
    module = train(tmp_path / "run", tiny_base, rows_file, MemoryRecord(tmp_path))
    assert module.trainer.global_step == 3
    assert "was not held against its plan: nothing to divide by" in caplog.text


# -- the table -------------------------------------------------------------------------------------

HEADER = "run,bytes\n"
LINES = 200


def _append(path: str, name: str) -> None:
    for number in range(LINES):
        append_row(Path(path), HEADER, f"{name},{number:0500d}\n")


def test_lines_of_runs_side_by_side_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "table.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(str(path), f"run{n}")) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    header, *lines = path.read_text().splitlines(keepends=True)
    assert header == HEADER
    assert sorted(lines) == sorted(f"run{n},{i:0500d}\n" for n in range(4) for i in range(LINES))


def test_a_line_that_a_kill_cut_short_is_closed_off(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    append_row(path, HEADER, "a,1\n")
    path.write_text(path.read_text() + "b,")
    append_row(path, HEADER, "c,3\n")
    assert path.read_text().splitlines() == ["run,bytes", "a,1", "b,", "c,3"]


def test_a_table_of_another_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("something,else\n1,2\n")
    for line in ("a,1\n", "b,2\n"):
        append_row(path, HEADER, line)
    assert path.read_text() == "something,else\n1,2\n"
    assert (tmp_path / "table-2.csv").read_text() == "run,bytes\na,1\nb,2\n"


def test_a_folder_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "table.csv").mkdir()
    with pytest.raises(TrainingStoppedError, match="could not be written"):
        append_row(tmp_path / "table.csv", HEADER, "a,1\n")


def test_every_column_has_one_name() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS)


def test_the_peak_is_said_beside_its_plan(tmp_path: Path) -> None:
    record = MemoryRecord(tmp_path)
    record.planned = {**dict.fromkeys(memory_record.COMPONENTS, 2**30), "allocated": 5 * 2**30}
    record.counted = {"gradients": 2**20, "peak_allocated": 4 * 2**30, "peak_reserved": 6 * 2**30}
    assert record.in_words() == (
        "memory, planned/counted in MiB: gradients 1,024.0/1.0; the peak was planned at 5.00 GiB "
        "and came to 4.00 (+25.0%), for which the allocator reserved 6.00 (1.50 times as much)."
    )
