"""A run in float64 whose weights stand still, and what its steps were; alone or as one of several.

As a program it is one device of a run that ``torchrun`` would have started:
``python exact_runs.py SETTINGS``, which are JSON, with the rank in the environment.
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
from torch import Tensor

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.strategies.choice import strategy_named


class Float64Module(QLoRAModule):
    """In float64 and with adapters away from zero, before anything is wrapped around it."""

    def configure_model(self) -> None:
        super().configure_model()
        draw = torch.Generator().manual_seed(0)
        assert self.model is not None
        self.model.double()
        with torch.no_grad():
            for parameter in self.trained_tensors().values():
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.add_(0.1 * noise)
        self.base_watch.remember(self.model, self.trainer.strategy.root_device)  # in float64


class Steps(Callback):
    """Notes every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validation: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.steps):
            return
        gradients = {name: p.grad.clone() for name, p in module.trained_tensors().items()}
        step = module.last_step
        self.steps.append(
            {
                "gradients": gradients,
                "loss": step.loss,
                "row_ids": list(step.row_ids),
                "counts": (step.num_rows, step.num_trained_tokens, step.num_tokens),
                "token_pairs": step.num_token_pairs,
            }
        )

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self.validation = dict(module.last_evaluation)


def run(settings: dict[str, Any]) -> tuple[QLoRAModule, Steps]:
    """Train as ``settings`` say; their keys: base, rows, folder, data, accumulation, devices, by.

    The learning rate is 1e-300, so that every step starts from the same weights.
    """
    seed_everything(7)
    module = Float64Module(
        settings["base"],
        quantization=QuantizationConfig(quant_type="none", compute_dtype="float32"),
        lora=LoRAConfig(r=4),
        optimizer=OptimizerConfig(name="sgd", lr=1e-300),
        normalize_loss_by=settings.get("by", "tokens"),
        gradient_checkpointing=settings.get("gradient_checkpointing", False),
    )
    data = InstructionDataModule(
        settings["rows"],
        **{"template": "guanaco", "val_size": 0, "max_length": 64} | settings["data"],
    )
    steps, devices = Steps(), settings.get("devices", 1)
    trainer = Trainer(
        default_root_dir=settings["folder"],
        max_epochs=settings.get("epochs", 1),
        accumulate_grad_batches=settings["accumulation"],
        accelerator="cpu",
        devices=devices,
        strategy=strategy_named("auto" if devices == 1 else "ddp"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[steps],
    )
    trainer.fit(module, data)
    return module, steps


def run_on_two(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The same as two processes that talk through gloo; what each of them noted in ``folder``."""
    run_processes(Path(__file__), 2, settings | {"devices": 2, "noted": str(folder)})
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def largest_error(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst tensor's difference, as a share of its norm (or of a thousandth of the whole's).

    A key's bias moves all scores of a row alike: its gradient is rounding and has no size.
    """
    assert ours.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return max(
        float((ours[name] - gradient).norm() / max(gradient.norm(), 1e-3 * whole))
        for name, gradient in expected.items()
    )


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    _, noted = run(given)
    torch.save(
        {"steps": noted.steps, "validation": noted.validation},
        Path(given["noted"]) / f"rank{os.environ['RANK']}.pt",
    )
