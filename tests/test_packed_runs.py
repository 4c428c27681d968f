"""Packed runs end to end: who packs, that asking changes nothing, and that a run can be resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapter_runs import KillAt, Killed, digest, one_thread  # noqa: F401 (used by pytest)
from conftest import save_base
from families import Saver
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file, save_file

from qlora_pl.cli import read_runs
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.errors import CheckpointError, ConfigurationError, TrainingStoppedError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import newest_verified

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


class Batches(Callback):
    """What each micro-batch of training and validation was."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Any]] = []
        self.validated: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, _: int) -> None:
        self.trained.append(batch)

    def on_validation_batch_start(self, trainer: Trainer, module: Any, batch: Any, *_: Any) -> None:
        self.validated.append(batch)


def fit(
    folder: Path,
    base: Path,
    rows: Path,
    *callbacks: Callback,
    kill_at: int | None = None,
    **data: Any,
) -> Batches:
    """Four steps of two micro-batches, in NF4 with dropout; goes on from the folder's newest."""
    seed_everything(3)
    module = QLoRAModule(
        str(base),
        quantization=QuantizationConfig(compute_dtype="float32"),
        lora=LoRAConfig(r=4, dropout=0.1),
        optimizer=OptimizerConfig(lr=1e-2),
    )
    settings = {"template": "guanaco", "val_size": 2, "batch_size": 1, "max_length": 64}
    batches = Batches()
    saver = AdapterCheckpoint(every_n_steps=100 if kill_at is None else 1)  # and at its end
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=4,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[saver, KillAt(kill_at), batches, *callbacks],
    )
    trainer.fit(
        module, InstructionDataModule(rows, **settings | data), ckpt_path=newest_verified(folder)
    )
    return batches


@pytest.mark.parametrize("packing", [True, "auto"])
def test_a_family_that_keeps_rows_apart_is_packed(
    packing: Any, saved: Saver, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Loaders are made after the model was asked; validation rows are padded all the same."""
    with caplog.at_level(logging.INFO, "qlora_pl.data.datamodule"):
        batches = fit(tmp_path, saved("LLaMA"), rows_file, packing=packing)
    assert all("attention_mask" not in batch for batch in batches.trained)
    assert max(len(batch["row_ids"]) for batch in batches.trained) >= 2
    assert all("position_ids" not in batch for batch in batches.validated)
    (line,) = {message for message in caplog.messages if message.startswith("batches: ")}
    assert "20 rows in " in line
    assert "packs of 64 tokens, " in line


def test_auto_pads_where_the_model_mixes_rows_and_asking_changes_no_byte(
    saved: Saver, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dropout draws from the generator that asking must leave alone."""
    with caplog.at_level(logging.WARNING):
        asked = fit(tmp_path / "auto", saved("OPT"), rows_file, packing="auto")
    assert all("position_ids" not in batch for batch in asked.trained)
    assert sum("rows are padded, since OPTForCausalLM" in m for m in caplog.messages) == 1
    fit(tmp_path / "off", saved("OPT"), rows_file)
    assert digest(tmp_path / "auto") == digest(tmp_path / "off")


def test_on_refuses_a_family_that_mixes_rows_before_the_first_step(
    saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.packing: FalconForCausalLM lets a packed"):
        fit(tmp_path, saved("Falcon (rotary)"), rows_file, packing=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_diverged_pack_names_its_rows(rows_file: Path, tmp_path: Path) -> None:
    """The rows of the micro-batch, of which the 20th holds a token whose embedding is no number."""
    base = save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["model.embed_tokens.weight"][vocabulary["~"]] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rows[19]["response"] += "~"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = Batches()
    with pytest.raises(TrainingStoppedError, match=r"the loss is nan, with .*, row 20\b") as caught:
        fit(tmp_path / "run", base, path, batches, packing=True, val_size=0)
    assert str(caught.value).count(f"{path}, row") == len(batches.trained[-1]["row_ids"]) > 1


SHAPES: dict[str, dict[str, Any]] = {
    "packs": {"packing": True},
    "budget": {"tokens_per_batch": 128},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kill_at", [1, 3])
def test_a_killed_run_ends_at_the_same_bytes(
    shape: str, kill_at: int, saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    base, data = saved("LLaMA"), SHAPES[shape]
    fit(tmp_path / "whole", base, rows_file, **data)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", base, rows_file, kill_at=kill_at, **data)
    fit(tmp_path / "killed", base, rows_file, **data)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"packing": False}, r"the tokens of a pack .* it had 64, this run has None"),
        ({"packing": True, "max_length": 56}, "it had 64, this run has 56"),
        ({"tokens_per_batch": 128}, r"data.tokens_per_batch: it had None, this run has 128"),
    ],
)
def test_a_packed_run_is_not_continued_by_another(
    changed: dict[str, Any], words: str, saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, saved("LLaMA"), rows_file, kill_at=2, packing=True)
    with pytest.raises(CheckpointError, match=words):
        fit(tmp_path, saved("LLaMA"), rows_file, **changed)


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"), [("on", True), ("off", False), ("auto", "auto"), ("true", True)]
)
def test_packing_is_written_on_off_or_auto(
    written: str, value: Any, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    config = {
        "model": {"model_name_or_path": str(tiny_base)},
        "data": {"sources": str(rows_file)},
        "trainer": {"max_steps": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    (run,) = read_runs([["--config", str(path), f"--data.packing={written}"]])
    assert run.data.packing == value
    path.write_text(path.read_text().replace("data:\n", f"data:\n  packing: {written}\n"))
    (run,) = read_runs([["--config", str(path)]])
    assert run.data.packing == value


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tokens_per_batch": 512, "packing": True}, "data.tokens_per_batch: packs have"),
        ({"tokens_per_batch": 512, "group_by_length": False}, "needs group_by_length: true"),
        (
            {"tokens_per_batch": 500, "max_length": 500},
            "data.tokens_per_batch: 500 does not hold a row of max_length tokens, padded to 504.",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        InstructionDataModule([{"text": "a"}], **settings)


def test_every_batch_is_as_wide_where_that_is_asked_for(tiny_base: Path, rows_file: Path) -> None:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    data = InstructionDataModule(
        rows, tokenizer=str(tiny_base), padding="max_length", max_length=99, val_size=5
    )
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert {batch["input_ids"].shape[1] for batch in loader} == {104}
