"""Rows a window at a time: the same rows in the same order, whatever was read before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_runs import KillAt, Killed, digest, make_data, make_module
from lightning.pytorch import Callback, Trainer, seed_everything
from toy_tokenizers import build

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.preparation import Source
from qlora_pl.data.templates.loading import load_template
from qlora_pl.data.windows import Windows
from qlora_pl.errors import CheckpointError, ConfigurationError, DatasetFormatError
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import newest_verified

STEPS = 11
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


def row(number: int, size: int = 3) -> dict[str, str]:
    return {"prompt": f"q{number}", "response": f"{number} " + "7" * size}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(23)))
    return path


def windows(path: Any, size: int = 5, num_val: int = 0, **limits: Any) -> Windows:
    tokenizer = build("bytes")
    encoder = Encoder(load_template("guanaco", tokenizer), tokenizer)
    source = Source(RowSources.parse(path if isinstance(path, list) else str(path)))
    return Windows(source, encoder, Limits(**limits), size, num_val)


def asked(split: Any) -> list[str]:
    return [c.messages[0].content for c in split.conversations]


def test_windows_hold_every_row_once_a_pass_and_then_the_first_again(rows: Path):
    of_file = windows(rows)
    expected = [[f"q{n}" for n in range(start, min(start + 5, 23))] for start in range(0, 23, 5)]
    found = [asked(of_file.read(number)) for number in range(12)]
    assert found == (3 * expected)[:12]


@pytest.mark.parametrize("number", [0, 3, 4, 5, 9, 14])
def test_a_window_is_the_same_whether_those_before_it_were_read_or_not(rows: Path, number: int):
    one, other = windows(rows), windows(rows)
    for before in range(number):
        one.read(before)
    assert one.read(number).rows.fingerprint() == other.read(number).rows.fingerprint()
    assert [str(p) for p in one.read(number).places] == [str(p) for p in other.read(number).places]


def test_a_source_that_ends_with_a_window_begins_anew(rows: Path):
    for fresh in (windows(rows, size=23), windows(rows, size=30)):
        assert asked(fresh.read(1)) == asked(fresh.read(0)) == [f"q{n}" for n in range(23)]


def test_the_first_rows_validate_and_are_in_no_window(rows: Path):
    of_file = windows(rows, num_val=4)
    assert asked(of_file.validation()) == ["q0", "q1", "q2", "q3"]
    trained = [name for number in range(8) for name in asked(of_file.read(number))]
    assert set(trained) == {f"q{n}" for n in range(4, 23)}
    assert asked(windows(rows, num_val=4).read(7)) == trained[-4:] == ["q19", "q20", "q21", "q22"]


def test_the_budget_is_kept_while_training_goes_on():
    """Nothing is lost in the first window, too much of both in the second."""
    late = windows([row(n) for n in range(5)] + [row(n, 400) for n in range(5)], max_length=100)
    late.read(0)
    with pytest.raises(ConfigurationError, match=r"data\.max_length \d+ would keep within it"):
        late.read(1)


def test_a_window_of_which_nothing_is_left_is_named():
    long = {"prompt": "q" * 300, "response": "7"}
    late = windows([row(n) for n in range(5)] + [long] * 5, max_length=100, max_lost_ratio=1.0)
    late.read(0)
    with pytest.raises(ConfigurationError, match=r"none of the 5 rows of window 2 \(.*row 6 to .*"):
        late.read(1)


def test_bad_rows_are_left_out_until_they_are_too_many():
    good, bad = [row(n) for n in range(40)], [{"prompt": "q"}] * 10
    tokenizer = build("bytes")
    encoder = Encoder(load_template("guanaco", tokenizer), tokenizer)
    source = Source(RowSources.parse([*good[:20], bad[0], *good[20:], *bad, *good]), "skip")
    of_rows = Windows(source, encoder, Limits(), 20, 0)
    assert [asked(of_rows.read(n))[0] for n in range(2)] == ["q0", "q20"]
    with pytest.raises(DatasetFormatError, match="11 of the 71 rows so far are bad"):
        of_rows.read(2)


def test_a_connection_that_breaks_names_the_last_row(monkeypatch: pytest.MonkeyPatch):
    """Streamed over a real ``IterableDataset`` whose source ends in an error."""
    import datasets

    def broken() -> Iterator[dict[str, str]]:
        yield from (row(number) for number in range(7))
        raise ConnectionError("reset by peer")

    def load(*_: Any, streaming: bool, **__: Any) -> Any:
        assert streaming
        return datasets.IterableDataset.from_generator(broken)

    monkeypatch.setattr(datasets, "load_dataset", load)
    tokenizer = build("bytes")
    encoder = Encoder(load_template("guanaco", tokenizer), tokenizer)
    sources = RowSources.parse({"path": "some/rows", "streaming": True})
    of_hub = Windows(Source(sources), encoder, Limits(), 5, 0)
    assert len(of_hub.read(0).rows) == 5
    with pytest.raises(DatasetFormatError, match=r"after some/rows, row 7 \(.*--ckpt_path last"):
        of_hub.read(1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"window": 0}, r"data\.window: must be at least 1, got 0\."),
        ({"sources": {"path": "a/b", "streaming": True}}, r"data\.window: 'a/b' is streamed"),
        ({"window": 5, "val_size": 0.1}, r"data\.val_size: a share of 0\.1 is of rows that"),
        ({"window": 5, "val_size": 2, "max_train_samples": 3}, r"data\.max_train_samples: set"),
    ],
)
def test_settings_that_windows_cannot_have_are_one_sentence(
    rows: Path, tiny_base: Path, tmp_path: Path, settings: dict[str, Any], sentence: str
):
    def start() -> None:
        data = InstructionDataModule(**{"sources": str(rows)} | settings)
        trainer(tmp_path / "run").fit(make_module(tiny_base), data)

    with pytest.raises(ConfigurationError, match=sentence):
        start()


def trainer(folder: Path, *callbacks: Any, save_every: int = 1) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[AdapterCheckpoint(every_n_steps=save_every), *callbacks],
    )


def run(
    folder: Path, base: Path, rows: Path, kill_at: int | None, **settings: Any
) -> tuple[str, list[tuple[int, ...]]]:
    """The finished adapter, and the rows of the steps that were taken here."""
    seed_everything(3)
    steps = Steps()
    save_every = 100 if kill_at is None else 1  # and at its end
    trainer(folder, KillAt(kill_at), steps, save_every=save_every).fit(
        make_module(base), make_data(rows, **settings), ckpt_path=newest_verified(folder)
    )
    return digest(folder), steps.rows


class Steps(Callback):
    """Notes the rows of every step, by their places."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, _: Any, __: Any, batch: Any, *___: Any) -> None:
        self.rows.append(trainer.datamodule.name_rows(batch["row_ids"].tolist()))  # type: ignore


WINDOWS = {"window": 7, "batch_size": 4}
"""Two steps each."""


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> tuple[Path, str, list[tuple[int, ...]]]:
    """The rows of an uninterrupted run, its adapter, and the rows of its steps."""
    folder = tmp_path_factory.mktemp("windows")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(23)))
    return path, *run(folder / "whole", tiny_base, path, None, **WINDOWS)


def test_a_run_over_windows_takes_every_row_once_a_pass(whole: Any):
    path, _, steps = whole
    assert len(steps) == STEPS
    assert sorted(name for step in steps[:6] for name in step) == sorted(
        f"{path}, row {n}" for n in range(3, 24)
    )


@pytest.mark.parametrize(
    "kill_at", [2, 7, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 6))]
)
def test_a_run_over_windows_that_is_killed_ends_in_the_same_bytes(
    whole: Any, tiny_base: Path, tmp_path: Path, kill_at: int
):
    """Killed at a window's end, and within a later one; the slow ones elsewhere."""
    path, adapter, steps = whole
    with pytest.raises(Killed):
        run(tmp_path, tiny_base, path, kill_at, **WINDOWS)
    resumed, rest = run(tmp_path, tiny_base, path, None, **WINDOWS)
    assert resumed == adapter
    assert rest == steps[-len(rest) :]
    assert len(rest) <= STEPS - kill_at + 1  # a step is saved when the next one begins


def test_a_run_over_other_windows_is_not_continued(rows: Path, tiny_base: Path, tmp_path: Path):
    with pytest.raises(Killed):
        run(tmp_path / "run", tiny_base, rows, 3, window=7)
    with pytest.raises(CheckpointError, match=r"data\.window: it had 7, this run has 8"):
        run(tmp_path / "run", tiny_base, rows, None, window=8)
