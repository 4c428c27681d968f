"""Small bases, their float32 twins, and whole runs, for the tests of what adapters can be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.loading.base_loading import LoadedBase, load_base
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.modeling.parameters import trainable_tensors
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import newest_verified

CPU = torch.device("cpu")
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(5, 37).reshape(2, 16)
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For a test file that imports it: over matrices this small threads only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(
    folder: Path,
    compute: str = "float32",
    quant_type: str = "nf4",
    device: torch.device = CPU,
    **settings: Any,
) -> LoadedBase:
    config = QuantizationConfig(
        compute_dtype=compute,  # type: ignore[arg-type]
        quant_type=quant_type,  # type: ignore[arg-type]
        cache=False,
        **settings,
    )
    plan = plan_quantization(build_skeleton(folder), config)
    identity = identify_base(str(folder), None, None)
    return load_base(identity, config, plan, device=device)


def twin_of(loaded: LoadedBase, folder: Path) -> nn.Module:
    """Plain transformers in float32, whose linears hold what the packed ones decode to."""
    import transformers
    from transformers.pytorch_utils import Conv1D

    is_pair = loaded.model.config.is_encoder_decoder  # type: ignore[union-attr]
    kind = "AutoModelForSeq2SeqLM" if is_pair else "AutoModelForCausalLM"
    twin = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    for name in loaded.plan.quantized:
        packed: Any = loaded.model.get_parameter(name)
        layer: Any = loaded.model.get_submodule(name.rpartition(".")[0])
        if packed.dtype == torch.int8:
            scales = layer.state.SCB if packed.SCB is None else packed.SCB
            values = packed.data.float() * scales[:, None] / 127
        else:
            values = bnb.dequantize_4bit(packed.data, packed.quant_state).float()
        module: Any = twin.get_submodule(name.rpartition(".")[0])
        module.weight.data = values.t().contiguous() if isinstance(module, Conv1D) else values
    return twin


def plain_peft(model: nn.Module, targets: str | list[str], **settings: Any) -> nn.Module:
    """PEFT's own adapters, without a line of this project."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": targets, "task_type": "CAUSAL_LM"} | settings
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def fill(model: nn.Module, seed: int = 0) -> None:
    """Move every trained tensor off its start; a B of zero would hide A."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable_tensors(model).items():
            noise = 0.1 * torch.randn(parameter.shape, generator=draw)
            if "magnitude" in name:
                parameter.mul_(1 + noise)  # lengths are about 1
            else:
                parameter.add_(noise)


def copy_trained(source: nn.Module, target: nn.Module) -> None:
    tensors = trainable_tensors(source)
    trained = trainable_tensors(target)
    assert tensors.keys() == trained.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of the next tokens, and the gradient of every trained tensor."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits.float()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    trained = trainable_tensors(model)
    assert [name for name, p in trained.items() if p.grad is None] == []
    return loss.detach(), {name: p.grad.clone() for name, p in trained.items()}  # type: ignore


def layers_of(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the names of what they adapt."""
    """The adapted layers by their names in the base."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def a_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every A."""
    return {
        n: layer.lora_A["default"].weight.detach().clone() for n, layer in layers_of(model).items()
    }


def assert_same_gradients(
    gradients: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Apart by at most this share of the tensor's largest."""
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients.items():
        # A key's bias moves every score of a row alike: its gradient is rounding, and no scale.
        scale = max(expected[name].abs().max(), 1e-4 * largest)
        assert (gradient - expected[name]).abs().max() <= tolerance * scale, name


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits


class Killed(Exception):
    """Stands for a kill, within one process."""


class KillAt(Callback):
    """Stops the process before a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def make_module(
    base: Path, compute: str = "float32", quant_type: str = "nf4", lr: float = 1e-2, **lora: Any
) -> QLoRAModule:
    return QLoRAModule(
        str(base),
        quantization=QuantizationConfig(compute_dtype=compute, quant_type=quant_type),  # type: ignore
        lora=LoRAConfig(**{"r": 4, "dropout": 0.1} | lora),
        optimizer=OptimizerConfig(lr=lr),
    )


def make_data(rows: Path, **changes: Any) -> InstructionDataModule:
    settings = {"template": "guanaco", "val_size": 2, "batch_size": 2, "max_length": 48}
    return InstructionDataModule(rows, **settings | changes)


def make_trainer(folder: Path, *callbacks: Callback, save_every: int = 1) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        max_steps=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=1,
        callbacks=[AdapterCheckpoint(every_n_steps=save_every), *callbacks],
    )


def fit(
    folder: Path, base: Path, rows: Path, *callbacks: Callback, kill_at: int | None = None, **s: Any
) -> QLoRAModule:
    """Three steps, from the folder's newest checkpoint if there is one; ends as a whole run does.

    Raises:
        Killed: before step ``kill_at``, counted from 0.
    """
    seed_everything(3)
    module = make_module(base, **s)
    save_every = 100 if kill_at is None else 1  # and at its end
    trainer = make_trainer(folder, KillAt(kill_at), *callbacks, save_every=save_every)
    trainer.fit(module, make_data(rows), ckpt_path=newest_verified(folder))
    return module


def digest(run: Path) -> str:
    """Of the finished adapter's weights."""
    return hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()
