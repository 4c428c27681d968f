"""PEFT's own adapters in folders, edited on disk, and the numbers that are told of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from adapter_runs import fill
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

Type = Callable[..., tuple[int, str, str]]
WEIGHTS = "adapter_model.safetensors"
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(folder: Path, base: Path, seed: int = 0, **settings: Any) -> Any:
    """A PEFT adapter away from its start, in its own folder; returns the PEFT model."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": EVERYWHERE, "task_type": "CAUSAL_LM"}
        | settings
    )
    model: Any = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config
    )
    fill(model, seed)
    model.save_pretrained(folder)
    return model


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def numbers_of(type_in: Type, *words: object, code: int = 0) -> dict[str, Any]:
    got, out, said = type_in("inspect", "adapter", *words, "--json")
    assert got == code, said
    found: dict[str, Any] = json.loads(out)
    return found
