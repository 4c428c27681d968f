"""A run in float32 that may be stopped, in one process or as one of several that talk over gloo.

As a program it is one device of a run that ``torchrun`` would have started:
``python layout_runs.py SETTINGS``, which are JSON, with the rank in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from adapter_runs import KillAt, Killed
from gloo import run_processes
from lightning.pytorch import Callback, Trainer, seed_everything

from qlora_pl.batch import FILLER_ROW
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig, ScheduleConfig
from qlora_pl.strategies.choice import strategy_named
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import newest_verified
from qlora_pl.training.trainer_settings import RunTrainer
from qlora_pl.training.watching.monitoring import RunMetrics


class StepRows(Callback):
    """Writes down this device's rows of every step, by their places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_micro_batches = 0
        self.start = 0

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.start = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.num_micro_batches += 1
        if module._micro_batches:  # the step goes on
            return
        ids = [row for row in module.last_step.row_ids if row != FILLER_ROW]
        line = {
            "start": self.start,
            "step": trainer.global_step,
            "rows": trainer.datamodule.name_rows(ids),  # type: ignore[attr-defined]
            "micro_batches": self.num_micro_batches,
        }
        self.num_micro_batches = 0
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def run(settings: dict[str, Any]) -> Trainer:
    """Train as ``settings`` say; goes on from the folder's newest checkpoint if there is one.

    Their keys: base, rows, folder, data, trainer, module, lora, kill_at (a step), devices and,
    for several of them, strategy.

    Raises:
        Killed: before the step after ``kill_at``; that of the step itself is not saved yet.
    """
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(7, verbose=False)
    module = QLoRAModule(
        settings["base"],
        quantization=QuantizationConfig(compute_dtype="float32"),
        lora=LoRAConfig(**{"r": 4} | settings.get("lora", {})),
        optimizer=OptimizerConfig(lr=1.0e-2),
        schedule=ScheduleConfig(name="cosine_with_floor", warmup_steps=2),
        gradient_checkpointing=False,
        **settings.get("module", {}),
    )
    data = InstructionDataModule(
        settings["rows"],
        **{"template": "guanaco", "val_size": 2, "max_length": 64, "global_batch_size": 4}
        | settings["data"],
    )
    rank, devices = int(os.environ.get("RANK", "0")), settings.get("devices", 1)
    trainer = RunTrainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=devices,
        strategy=strategy_named("auto" if devices == 1 else settings.get("strategy", "ddp")),
        gradient_clip_val=0.3,
        logger=False,
        log_every_n_steps=1,
        num_sanity_val_steps=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            RunMetrics(),
            StepRows(folder / f"rows-{rank}.jsonl"),
            KillAt(settings.get("kill_at")),
            AdapterCheckpoint(every_n_steps=1, keep_last=2),
        ],
        **{"max_epochs": 2} | settings.get("trainer", {}),
    )
    trainer.fit(module, data, ckpt_path=newest_verified(folder))
    return trainer


def run_on(devices: int, settings: dict[str, Any]) -> None:
    """The same as so many processes; one is this process."""
    if devices == 1:
        try:
            run(settings)
        except Killed:
            assert settings.get("kill_at") is not None
        return
    Path(settings["folder"]).mkdir(parents=True, exist_ok=True)
    run_processes(Path(__file__), devices, settings | {"devices": devices})


def rows_of_steps(folder: Path) -> dict[int, list[str]]:
    """The rows of each step over all devices, in no order; of a step done twice, the second time.

    The first was not saved, and may have been done by more devices.
    """
    lines = [
        json.loads(line)
        for path in folder.glob("rows-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    starts = {
        step: max(line["start"] for line in lines if line["step"] == step)
        for step in {line["step"] for line in lines}
    }
    found: dict[int, list[str]] = {step: [] for step in starts}
    for line in lines:
        if line["start"] == starts[line["step"]]:
            found[line["step"]] += line["rows"]
    return {step: sorted(rows) for step, rows in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        run(json.loads(sys.argv[1]))
    except Killed:
        sys.stdout.flush()
        os._exit(0)
