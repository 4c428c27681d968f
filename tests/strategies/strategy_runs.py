"""One experiment under any strategy: NF4 base, packed rows, accumulation, clipping, real processes.

As a program it is one process of a run that ``torchrun`` would have started:
``python strategy_runs.py SETTINGS``, which are JSON, with the rank in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from gloo import run_processes
from lightning.pytorch import Callback, Trainer, seed_everything

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.base_checksum import combined, frozen_checksums
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import newest_verified


class Losses(Callback):
    """Notes the loss, norm and rows of every step, and every validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validations: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        step = module.last_step
        if step is None or (self.steps and self.steps[-1]["step"] == trainer.global_step):
            return
        self.steps.append(
            {
                "step": trainer.global_step,
                "loss": step.loss,
                "norm": step.grad_norm,
                "rows": list(step.row_ids),
            }
        )

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self.validations.append(module.last_evaluation["val/loss"])


def strategy_of(name: str) -> Any:
    """Imported here, so that a run on one process needs none of them."""
    from qlora_pl.strategies.ddp import AdapterDDP
    from qlora_pl.strategies.fsdp2 import FSDP2Strategy

    kinds = {
        "one": lambda: "auto",
        "ddp": AdapterDDP,
        "fsdp2": FSDP2Strategy,
        "fsdp2_offload": lambda: FSDP2Strategy(cpu_offload=True),
    }
    return kinds[name]()


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as ``settings`` say.

    Keys: base, rows, folder, strategy, devices; batch_size, accumulation, max_steps, and settings
    of the module's parts and of the data that differ from those below.
    """
    seed_everything(7)
    module = QLoRAModule(
        settings["base"],
        quantization=QuantizationConfig(
            **{"compute_dtype": "float32"} | settings.get("quantization", {})
        ),
        lora=LoRAConfig(**{"r": 8} | settings.get("lora", {})),
        optimizer=OptimizerConfig(**{"lr": 1e-2} | settings.get("optimizer", {})),
        gradient_checkpointing=settings.get("gradient_checkpointing", True),
    )
    data = InstructionDataModule(
        settings["rows"],
        batch_size=settings["batch_size"],
        **{
            "template": "guanaco",
            "val_size": 4,
            "max_length": 64,
            "packing": True,
            "max_lost_ratio": 1.0,
        }
        | settings.get("data", {}),
    )
    losses = Losses()
    devices = settings["devices"]
    trainer = Trainer(
        default_root_dir=settings["folder"],
        max_steps=settings.get("max_steps", 6),
        accumulate_grad_batches=settings["accumulation"],
        gradient_clip_val=0.3,
        accelerator=settings.get("accelerator", "cpu"),
        devices=devices,
        strategy=strategy_of(settings["strategy"]),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=-1,
        callbacks=[losses, AdapterCheckpoint(every_n_steps=2)],
    )
    resumed = newest_verified(Path(settings["folder"])) if settings.get("resumes") else None
    trainer.fit(module, data, ckpt_path=resumed)
    return {
        "steps": losses.steps,
        "validations": losses.validations,
        "base": combined(frozen_checksums(module.model, module.device)),
    }


def run_on(num_processes: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The same as processes that talk through gloo; what each of them noted."""
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    run_processes(Path(__file__), num_processes, settings | {"devices": num_processes})
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(num_processes)]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    noted = run(given)
    torch.save(noted, Path(given["folder"]) / f"rank{os.environ['RANK']}.pt")
