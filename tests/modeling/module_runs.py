"""Whole runs of ``QLoRAModule`` over a tiny base, what their steps were, and a float32 twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig

SGD = OptimizerConfig(name="sgd", lr=0.1)


class Recorder(Callback):
    """What each optimizer step was: statistics, gradients after clipping, adapters after it."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.steps: list[Any] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.adapters: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.start = {name: p.detach().clone() for name, p in module.trained_tensors().items()}

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            trained = module.trained_tensors()
            self.steps.append(module.last_step)
            self.gradients.append({name: p.grad.clone() for name, p in trained.items()})
            self.adapters.append({name: p.detach().clone() for name, p in trained.items()})


def make_module(base: Path, compute: str = "float32", **changes: Any) -> QLoRAModule:
    settings: dict[str, Any] = {
        "quantization": QuantizationConfig(compute_dtype=compute),
        "lora": LoRAConfig(r=4),
        "optimizer": SGD,
        "gradient_checkpointing": False,
    }
    return QLoRAModule(str(base), **settings | changes)


def make_data(rows: Path, **changes: Any) -> InstructionDataModule:
    return InstructionDataModule(rows, **{"template": "guanaco", "val_size": 4} | changes)


def make_trainer(*callbacks: Callback, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "num_sanity_val_steps": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "use_distributed_sampler": False,
    }
    return Trainer(callbacks=list(callbacks), **settings | changes)


def fit(
    base: Path,
    rows: Path,
    *callbacks: Callback,
    batch_size: int = 2,
    accumulation: int = 2,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **model: Any,
) -> tuple[QLoRAModule, Recorder]:
    """Train on 18 of the 22 rows, four to a step: the last step of an epoch has two."""
    seed_everything(7)
    module, recorder = make_module(base, **model), Recorder()
    run = make_trainer(recorder, *callbacks, accumulate_grad_batches=accumulation, **trainer or {})
    run.fit(module, make_data(rows, batch_size=batch_size, **data or {}))
    return module, recorder


class Twin:
    """A float32 model whose base holds the dequantised weights, with plain PEFT adapters.

    Made of the file's tensors, bitsandbytes' quantiser, transformers and PEFT; nothing of ours.
    """

    def __init__(self, base: Path, start: dict[str, Tensor]) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for name, tensor in load_file(base / "model.safetensors").items():
            if name.endswith("_proj.weight"):
                packed = bnb.quantize_4bit(
                    tensor.float(), quant_type="nf4", compress_statistics=True
                )
                model.get_parameter(name).data = bnb.dequantize_4bit(*packed)
        parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=parts, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(model, lora).train()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(start[f"model.{name}"])

    def token_losses(self, ids: Any, labels: Any) -> Tensor:
        """Nats of each trained token of one row, without padding."""
        logits = self.model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
        targets = torch.from_numpy(labels)[1:]
        kept = targets != -100
        return functional.cross_entropy(logits[kept], targets[kept], reduction="none")

    def step(
        self, rows: list[Any], normalize_by: str, lr: float
    ) -> tuple[float, dict[str, Tensor]]:
        """One step of plain gradient descent; loss per token, and the gradients."""
        losses = [self.token_losses(*row) for row in rows]
        tokens = torch.cat(losses).mean()
        mean = (
            tokens if normalize_by == "tokens" else torch.stack([x.mean() for x in losses]).mean()
        )
        self.model.zero_grad()
        mean.backward()
        with torch.no_grad():
            for parameter in self.trained.values():
                parameter -= lr * parameter.grad
        return tokens.item(), {n: p.grad.clone() for n, p in self.trained.items()}
