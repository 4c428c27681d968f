"""The seven files of the journey together, in Lightning's hooks."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DistributedSampler

from qlora_pl.batch import FILLER_ROW, Batch
from qlora_pl.data.batches.ordering import epoch_steps
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.errors import CheckpointError, ConfigurationError, DatasetFormatError

ROWS = [{"prompt": f"Question {n}?", "response": "7" * (1 + n % 9)} for n in range(30)]


@pytest.fixture
def make(tiny_base: Path) -> Callable[..., InstructionDataModule]:
    """A data module over thirty rows in memory."""

    def data(
        sources: Any = ROWS, val_sources: Any = None, **settings: Any
    ) -> InstructionDataModule:
        settings = {"tokenizer": str(tiny_base), "batch_size": 2} | settings
        return InstructionDataModule(sources, val_sources, **settings)

    return data


@pytest.fixture
def ready(make: Callable[..., InstructionDataModule]) -> Callable[..., InstructionDataModule]:
    """The same, set up."""

    def data(*arguments: Any, stage: str = "fit", **settings: Any) -> InstructionDataModule:
        made = make(*arguments, **settings)
        made.setup(stage)
        return made

    return data


def asked(data: InstructionDataModule, split: str) -> list[str]:
    return [c.messages[0].content for c in data.splits[split].conversations]


def on_device(
    data: InstructionDataModule, rank: int, world_size: int, accumulation: int = 1
) -> Any:
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world_size,
        global_rank=rank,
        accumulate_grad_batches=accumulation,
        lightning_module=None,
        state=SimpleNamespace(fn="fit"),
    )
    return data


# -- which rows train and which validate ---------------------------------------------------------


def test_every_command_sees_the_same_rows(ready: Callable[..., InstructionDataModule]):
    seen = {
        stage: (asked(data, "train"), asked(data, "val"))
        for stage in ("fit", "validate", "predict")
        if (data := ready(stage=stage, val_size=6))
    }
    assert seen["fit"] == seen["validate"] == seen["predict"]
    train, val = seen["fit"]
    assert (len(train), len(val)) == (24, 6)
    assert Counter(train + val) == Counter(row["prompt"] for row in ROWS)


def test_the_split_depends_on_its_own_seed_alone(ready: Callable[..., InstructionDataModule]):
    def validated(**settings: Any) -> list[str]:
        return asked(ready(val_size=6, **settings), "val")

    first = validated()
    torch.manual_seed(1)
    same = [
        {"seed": 3},
        {"batch_size": 5},
        {"group_by_length": False},
        {"max_train_samples": 4},
        {"train_on": "everything"},
        {"template": "guanaco"},
    ]
    assert all(validated(**settings) == first for settings in same)
    assert validated(val_seed=43) != first
    assert validated(val_seed=-1) != first


def test_rows_of_a_split_keep_the_order_of_the_file(ready: Callable[..., InstructionDataModule]):
    data = ready(val_size=6)
    order = [row["prompt"] for row in ROWS]
    for split in ("train", "val"):
        places = [order.index(question) for question in asked(data, split)]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("val_size", "num_val"), [(0, 0), (0.0, 0), (1, 1), (6, 6), (29, 29), (0.2, 6), (0.01, 1)]
)
def test_val_size_is_a_number_or_a_share_of_the_rows(
    ready: Callable[..., InstructionDataModule], val_size: float, num_val: int
):
    """A share of 1 % of thirty rows is a row: nobody asks for a share to get none."""
    data = ready(val_size=val_size)
    assert (len(data.splits["train"].rows), len(data.splits["val"].rows)) == (30 - num_val, num_val)


def test_without_validation_rows_there_is_no_loader(ready: Callable[..., InstructionDataModule]):
    data = ready(val_size=0)
    assert asked(data, "train") == [row["prompt"] for row in ROWS]
    assert data.val_dataloader() == []
    with pytest.raises(ConfigurationError, match=r"data\.val_size: 0 leaves no validation rows"):
        data.predict_dataloader()


def test_validating_without_validation_rows_is_an_error(
    ready: Callable[..., InstructionDataModule],
):
    """Lightning's ``validate`` of no loader at all ends well, having scored nothing."""
    data = on_device(ready(val_size=0), 0, 1)
    data.trainer.state.fn = "validate"
    with pytest.raises(ConfigurationError, match=r"data\.val_size: 0 leaves no validation rows"):
        data.val_dataloader()


def test_no_row_is_left_to_train_on(ready: Callable[..., InstructionDataModule]):
    with pytest.raises(ConfigurationError, match=r"data\.val_size: 30 leaves none of the 30 rows"):
        ready(val_size=30)


def test_limits_take_the_first_rows_of_a_split(ready: Callable[..., InstructionDataModule]):
    whole = ready(val_size=6)
    cut = ready(val_size=6, max_train_samples=5, max_val_samples=2)
    assert asked(cut, "train") == asked(whole, "train")[:5]
    assert asked(cut, "val") == asked(whole, "val")[:2]
    large = ready(val_size=6, max_train_samples=999, max_val_samples=999)
    assert asked(large, "train") == asked(whole, "train")


def test_named_validation_rows_leave_all_others_to_train(
    ready: Callable[..., InstructionDataModule],
):
    data = ready(ROWS[:20], val_sources=ROWS[20:], val_size=6)
    assert asked(data, "train") == [row["prompt"] for row in ROWS[:20]]
    assert asked(data, "val") == [row["prompt"] for row in ROWS[20:]]


def test_a_second_setup_reads_nothing(
    ready: Callable[..., InstructionDataModule], monkeypatch: pytest.MonkeyPatch
):
    data = ready(val_size=6)
    before = dict(data.splits)
    monkeypatch.setattr("qlora_pl.data.splits.prepare_split", None)
    for stage in ("fit", "validate", "predict"):
        data.setup(stage)
    assert data.splits == before


def test_test_rows_are_read_for_test_alone(ready: Callable[..., InstructionDataModule]):
    data = ready(stage="test", test_sources=ROWS[:3])
    assert list(data.splits) == ["test"]
    (batch, rest) = data.test_dataloader()
    assert batch["row_ids"].tolist() + rest["row_ids"].tolist() == [2, 1, 0]
    with pytest.raises(ConfigurationError, match=r"data\.test_sources: no test rows are named"):
        ready(stage="test")


def test_what_was_cut_and_dropped_is_logged_before_the_split(
    make: Callable[..., InstructionDataModule], caplog: pytest.LogCaptureFixture
):
    """The counts are those of the whole file: a split knows only what it kept."""
    long = {"prompt": "q", "response": "7" * 100}
    lost = {"prompt": "q" * 200, "response": "7"}
    data = make([*ROWS, long, lost], max_length=80, max_lost_ratio=1.0, val_size=4)
    with caplog.at_level(logging.INFO, "qlora_pl.data"):
        data.setup("fit")
    (line,) = [m for m in caplog.messages if m.startswith("data.sources: ")]
    assert "31 rows" in line
    assert "1 rows cut" in line
    assert "1 rows dropped" in line


# -- splits of a Hub dataset ---------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[Any]]], list[str]]:
    """Puts a dataset with these splits in place of the Hub; returns the splits asked for."""

    def publish(splits: dict[str, list[Any]]) -> list[str]:
        asked: list[str] = []

        def load(path: str, subset: Any, split: str, revision: Any) -> datasets.Dataset:
            asked.append(split)
            return datasets.Dataset.from_list(splits[split.split("[")[0].split("+")[0]])

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: list(splits))
        return asked

    return publish


def test_a_validation_split_of_the_hub_is_used(
    ready: Callable[..., InstructionDataModule], hub: Callable[..., list[str]]
):
    loaded = hub({"train": ROWS[:20], "validation": ROWS[20:26], "test": ROWS[26:]})
    data = ready("someone/rows")
    assert (len(data.splits["train"].rows), len(data.splits["val"].rows)) == (20, 6)
    data.setup("test")
    assert asked(data, "test") == [row["prompt"] for row in ROWS[26:]]
    assert list(dict.fromkeys(loaded)) == ["train", "validation", "test"]


def test_a_test_split_is_not_used_for_validation(
    ready: Callable[..., InstructionDataModule], hub: Callable[..., list[str]]
):
    loaded = hub({"train": ROWS[:20], "test": ROWS[20:]})
    data = ready("someone/rows", val_size=5)
    assert (len(data.splits["train"].rows), len(data.splits["val"].rows)) == (15, 5)
    assert list(dict.fromkeys(loaded)) == ["train"]


@pytest.mark.parametrize("split", ["train+validation", "validation[:50%]", "validation"])
def test_a_split_that_is_trained_on_does_not_validate(
    ready: Callable[..., InstructionDataModule], hub: Callable[..., list[str]], split: str
):
    loaded = hub({"train": ROWS, "validation": ROWS})
    data = ready({"path": "someone/rows", "split": split}, val_size=5)
    assert (len(data.splits["train"].rows), len(data.splits["val"].rows)) == (25, 5)
    assert list(dict.fromkeys(loaded)) == [split]


def test_only_the_training_rows_of_the_hub_are_limited(
    ready: Callable[..., InstructionDataModule], hub: Callable[..., list[str]]
):
    hub({"train": ROWS[:20], "validation": ROWS[20:]})
    data = ready({"path": "someone/rows", "limit": 3})
    assert (len(data.splits["train"].rows), len(data.splits["val"].rows)) == (3, 10)


# -- loaders -------------------------------------------------------------------------------------


def row_ids(loader: Any) -> list[list[int]]:
    return [[row for row in batch["row_ids"].tolist() if row != FILLER_ROW] for batch in loader]


def as_lists(batch: Batch) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def test_workers_give_the_batches_of_the_main_process(
    ready: Callable[..., InstructionDataModule],
):
    alone, helped = (ready(val_size=6, num_workers=number) for number in (0, 2))
    for loader in ("train_dataloader", "val_dataloader", "predict_dataloader"):
        expected = [as_lists(batch) for batch in getattr(alone, loader)()]
        assert [as_lists(batch) for batch in getattr(helped, loader)()] == expected


def test_loaders_leave_the_global_generator_alone(ready: Callable[..., InstructionDataModule]):
    """Dropout draws from it; a loader that did would make validation change training."""
    data = ready(val_size=6)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in range(2):
        list(data.train_dataloader())
        list(data.val_dataloader())
        list(data.predict_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_devices_share_an_epoch_and_a_validation(ready: Callable[..., InstructionDataModule]):
    """Four micro-batches of one device are two of two devices and one of four."""

    def steps(world_size: int, accumulation: int) -> list[list[int]]:
        devices = [
            on_device(ready(val_size=7), rank, world_size, accumulation)
            for rank in range(world_size)
        ]
        validated = [part for device in devices for part in row_ids(device.val_dataloader())]
        assert sorted(chain.from_iterable(validated)) == list(range(7))
        shares = [row_ids(device.train_dataloader()) for device in devices]
        parts = [list(chain.from_iterable(each)) for each in zip(*shares, strict=True)]
        starts = range(0, len(parts), accumulation)
        return [list(chain.from_iterable(parts[i : i + accumulation])) for i in starts]

    assert steps(1, 4) == steps(2, 2) == steps(4, 1)
    assert sorted(chain.from_iterable(steps(1, 4))) == list(range(23))


def test_lightning_leaves_every_sampler_in_place(ready: Callable[..., InstructionDataModule]):
    """Without ``use_distributed_sampler: false``, it replaces all that are not distributed ones.

    Each device would then evaluate a part of its part.
    """
    data = ready(val_size=6, test_sources=ROWS[:4])
    data.setup("test")
    for loader in (
        data.train_dataloader(),
        data.val_dataloader(),
        data.test_dataloader(),
        data.predict_dataloader(),
    ):
        assert isinstance(loader.sampler, DistributedSampler)


def test_prompts_are_the_questions_of_the_validation_rows(
    ready: Callable[..., InstructionDataModule],
):
    data = ready(val_size=6, template="guanaco", eval_batch_size=4)
    prompts, references = [], []
    for batch in data.predict_dataloader():
        prompts += batch["prompts"]
        references += batch["references"]
    assert prompts == [f"### Human: {question}### Assistant:" for question in asked(data, "val")]
    assert references == [c.reference for c in data.splits["val"].conversations]


def test_plain_text_has_no_prompts(ready: Callable[..., InstructionDataModule]):
    data = ready([{"text": f"text {n}"} for n in range(10)], val_size=2)
    with pytest.raises(ConfigurationError, match=r"data\.val_sources: .* plain text"):
        data.predict_dataloader()


# -- in Lightning's loops ------------------------------------------------------------------------


in_lightning = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:`isinstance.treespec, LeafSpec",
    "ignore:predict returned None",
    "ignore:You requested to overfit but enabled",
)


class Recorder(LightningModule):
    """Notes the rows of every micro-batch and the optimizer step that they went into."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, int, tuple[int, ...]]] = []
        self.validated: list[int] = []
        self.predicted: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        rows = tuple(batch["row_ids"].tolist())
        self.trained.append((self.current_epoch, self.global_step, rows))
        return self.weight * 1.0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch["row_ids"].tolist()

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.predicted += batch["row_ids"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: InstructionDataModule, folder: Path, **settings: Any) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 2, "accumulate_grad_batches": 3} | settings,
    )
    trainer.fit(module, data)
    trainer.predict(module, data)
    return module


@in_lightning
def test_in_lightnings_loops_every_row_trains_once_an_epoch(
    make: Callable[..., InstructionDataModule], tmp_path: Path
):
    """25 rows, 6 a step: four whole steps and one of a single row, in each of two epochs."""
    data = make(val_size=5, seed=3)
    module = fit(data, tmp_path)
    for epoch in range(2):
        rows = [row for at, _, part in module.trained if at == epoch for row in part]
        assert Counter(rows) == Counter(range(25))
    in_steps: dict[int, list[int]] = {}
    for _, step, part in module.trained:
        in_steps.setdefault(step, []).extend(part)
    assert [len(rows) for rows in in_steps.values()] == [6, 6, 6, 6, 1] * 2
    expected = [
        step.tolist()
        for epoch in range(2)
        for step in epoch_steps(data.splits["train"].rows.lengths, 6, 3, epoch, True)
    ]
    assert list(in_steps.values()) == expected
    assert sorted(module.validated) == sorted([*range(5)] * 2)
    assert module.predicted == list(range(5))


@in_lightning
def test_overfitting_a_few_batches_repeats_them(
    make: Callable[..., InstructionDataModule], tmp_path: Path
):
    module = fit(make(val_size=5), tmp_path, overfit_batches=2, accumulate_grad_batches=1)
    parts = [part for _, _, part in module.trained]
    assert parts[:2] == parts[2:]
    assert len(parts) == 4


# -- resuming ------------------------------------------------------------------------------------


def test_a_resumed_loader_goes_on_where_it_stopped(ready: Callable[..., InstructionDataModule]):
    whole = ready(val_size=5, seed=3)
    data = ready(val_size=5, seed=3)
    data.resume_from(whole.describe(), epoch=1, position=4)
    loader, expected = data.train_dataloader(), whole.train_dataloader()
    for epoch in (1, 2):
        for each in (loader, expected):
            each.sampler.set_epoch(epoch)
        start = 4 if epoch == 1 else 0
        assert row_ids(loader) == row_ids(expected)[start:]


def test_a_run_after_a_resumed_one_starts_at_the_beginning(
    ready: Callable[..., InstructionDataModule],
):
    """The same data module in a notebook: fit with a checkpoint, then fit another model."""
    data = ready(val_size=5, seed=3)
    expected = row_ids(data.train_dataloader())
    data.resume_from(data.describe(), epoch=0, position=4)
    assert row_ids(data.train_dataloader()) == expected[4:]
    data.setup("fit")
    assert row_ids(data.train_dataloader()) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": ROWS[:-1]}, "the training rows"),
        ({"template": "guanaco"}, "the training rows (or their template, tokenizer or length)"),
        ({"batch_size": 3}, "(data.global_batch_size): it had 2, this run has 3"),
        ({"seed": 4}, "the seed of the order of rows: it had 3, this run has 4"),
        ({"group_by_length": False}, "data.group_by_length: it had True, this run has False"),
        ({"max_train_samples": 7}, "the number of training rows: it had 25, this run has 7"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_checkpoint_of_other_rows_or_another_order_is_refused(
    ready: Callable[..., InstructionDataModule], change: dict[str, Any], words: str
):
    saved = ready(val_size=5, seed=3).describe()
    other = ready(**{"sources": ROWS, "val_size": 5, "seed": 3} | change)
    with pytest.raises(CheckpointError) as caught:
        other.resume_from(saved, epoch=0, position=2)
    assert words in str(caught.value)


def test_what_describes_the_order_is_plain(ready: Callable[..., InstructionDataModule]):
    """``torch.load(weights_only=True)`` refuses a checkpoint with anything else in it."""
    described = ready(val_size=5, seed=3).describe()
    assert json.loads(json.dumps(described)) == described


def test_the_order_takes_the_seed_of_the_run(
    ready: Callable[..., InstructionDataModule], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert ready().describe()["seed"] == 11
    assert ready(seed=3).describe()["seed"] == 3
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert ready().describe()["seed"] == 0


def test_rows_are_named_by_file_and_number(
    ready: Callable[..., InstructionDataModule], write_rows: Callable[..., Path]
):
    path = write_rows(ROWS)
    data = ready(path, val_size=5)
    for split in ("train", "val"):
        for row, question in enumerate(asked(data, split)):
            number = [r["prompt"] for r in ROWS].index(question) + 1
            assert data.name_rows([FILLER_ROW, row], split) == [f"{path}, row {number}"]


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_length": 1}, "data.max_length: must be at least 2, got 1."),
        ({"batch_size": 0}, "data.batch_size: must be at least 1, got 0."),
        ({"eval_batch_size": 0}, "data.eval_batch_size: must be at least 1, got 0."),
        ({"max_lost_ratio": 1.5}, "data.max_lost_ratio: must lie in 0 to 1, got 1.5."),
        ({"val_size": -1}, "data.val_size: must be 0 or more, got -1."),
        ({"val_size": 1.0}, "data.val_size: a share lies below 1, got 1.0; write a whole number"),
        ({"num_workers": -1}, "data.num_workers: must be 0 or more, got -1."),
        ({"max_train_samples": 0}, "data.max_train_samples: must be at least 1, got 0."),
        ({"max_val_samples": 0}, "data.max_val_samples: must be at least 1, got 0."),
        ({"sources": "no/such/file.csv"}, "data.sources: no file 'no/such/file.csv'."),
        ({"val_sources": "no/such/file.csv"}, "data.val_sources: no file 'no/such/file.csv'."),
        ({"test_sources": "no/such/file.csv"}, "data.test_sources: no file 'no/such/file.csv'."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_impossible_setting_is_one_sentence(
    make: Callable[..., InstructionDataModule], settings: dict[str, Any], sentence: str
):
    with pytest.raises(ConfigurationError) as caught:
        make(**settings)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(sentence)


def test_all_impossible_settings_are_reported_together(
    make: Callable[..., InstructionDataModule],
):
    with pytest.raises(ConfigurationError) as caught:
        make("no/such/file.csv", max_length=0, batch_size=0, val_size=-1)
    assert len(caught.value.problems) == 4


def test_evaluation_batches_have_the_training_size_unless_named(
    make: Callable[..., InstructionDataModule],
):
    assert make(batch_size=3).eval_batch_size == 3
    assert make(batch_size=3, eval_batch_size=8).eval_batch_size == 8


def test_without_a_model_a_tokenizer_must_be_named(make: Callable[..., InstructionDataModule]):
    with pytest.raises(ConfigurationError, match=r"data\.tokenizer: name a tokenizer"):
        make(tokenizer=None).setup("fit")


def test_the_models_revision_is_not_asked_of_another_tokenizer(
    make: Callable[..., InstructionDataModule], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
):
    """A commit of the model's repository exists in no other."""
    from qlora_pl.data import splits

    asked_for: list[tuple[Any, ...]] = []

    def load(name: str, revision: Any, cache_dir: Any) -> Any:
        asked_for.append((name, revision, cache_dir))
        return real(str(tiny_base))

    real = splits.load_tokenizer
    monkeypatch.setattr(splits, "load_tokenizer", load)
    for name in ("load_model_config", "known_stop_tokens"):  # which would ask the Hub
        monkeypatch.setattr(splits, name, lambda *_: None)
    model = SimpleNamespace(model_name_or_path="a/model", revision="abc", cache_dir="/cache")
    for tokenizer in (None, "another/tokenizer"):
        data = on_device(make(tokenizer=tokenizer), 0, 1)
        data.trainer.lightning_module = model
        data.setup("fit")
    assert asked_for == [("a/model", "abc", "/cache"), ("another/tokenizer", None, "/cache")]


def test_a_bad_row_stops_the_set_up(
    make: Callable[..., InstructionDataModule], write_rows: Callable[..., Path]
):
    path = write_rows([*ROWS, {"prompt": "q"}])
    for arguments in ((path,), (ROWS, path)):
        with pytest.raises(DatasetFormatError, match=r"row 31: no 'response' field"):
            make(*arguments).setup("fit")
