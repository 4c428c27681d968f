"""Adapter folders of any PEFT program: found, and read without running what somebody put there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import BASE_CHANGING
from qlora_pl.modeling.folders.adapter_folder import WEIGHTS
from qlora_pl.modeling.folders.own_files import lies_in

PICKLED = "adapter_model.bin"
KEY = "model.lora.init_from"
"""Who names a folder, in messages, unless it is somebody else."""
UNKNOWN = ("alora_invocation_tokens", "arrow_config", "layer_replication", "use_qalora")
"""PEFT's settings under which the same tensors compute something else."""


def locate_adapter(name: str, key: str = KEY) -> Path:
    """The folder of an adapter: the one named, or the Hub's snapshot.

    Args:
        name: A folder, or a name on the Hub.
        key: Who names it, for messages.

    Raises:
        ConfigurationError: if it is neither, or holds no adapter.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _snapshot(name, key)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigurationError(f"{key}: '{name}' holds no adapter (no adapter_config.json).")
    for file in ("adapter_config.json", WEIGHTS, PICKLED):
        if not lies_in(folder, file):
            raise ConfigurationError(
                f"{key}: '{folder / file}' is a link that leads out of its folder; "
                "ask whoever sent it, or put the file itself there."
            )
    return folder


def _snapshot(name: str, key: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigurationError(f"{key}: no folder '{name}'.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", WEIGHTS, PICKLED]))
    except Exception as error:  # the client raises a dozen unrelated types
        raise ConfigurationError(
            f"{key}: '{name}' is neither a folder here nor an adapter that could be "
            f"fetched from the Hub ({type(error).__name__})."
        ) from error


def read_config(folder: Path, key: str = KEY) -> dict[str, Any]:
    """An adapter's settings in PEFT's words.

    Raises:
        ConfigurationError: if they cannot be read.
    """
    path = folder / "adapter_config.json"
    try:
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{key}: '{path}' cannot be read ({error}).") from error
    return saved


def other_kind(folder: Path, saved: dict[str, Any], key: str = KEY) -> list[str]:
    """What an adapter is that the same tensors over the plain base would not be."""
    problems = []
    if saved.get("peft_type") != "LORA":
        problems.append(f"is an adapter of the kind {saved.get('peft_type')}, and not LORA.")
    init = str(saved.get("init_lora_weights"))
    if init.startswith((*BASE_CHANGING, "lora_ga")):
        problems.append(
            f"has init_lora_weights {init}, which changes the base; convert it to a plain LoRA "
            "with PEFT's path_initial_model_for_weight_conversion."
        )
    problems += [
        f"has {setting}, which this project does not know."
        for setting in UNKNOWN
        if saved.get(setting)
    ]
    return [f"{key}: '{folder}' {problem}" for problem in problems]


def read_tensors(folder: Path, key: str = KEY) -> dict[str, Tensor]:
    """An adapter's tensors by name, from safetensors or, without running any code, a pickle.

    Raises:
        ConfigurationError: if they cannot be read.
    """
    from safetensors.torch import load_file

    paths = [folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()]
    if not paths:
        raise ConfigurationError(f"{key}: '{folder}' has no {WEIGHTS}.")
    path = paths[0]
    try:
        if path.name == WEIGHTS:
            loaded = load_file(path)
        else:  # tensors alone: a pickle could run anything
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise half a dozen unrelated types
        raise ConfigurationError(
            f"{key}: '{path}' cannot be read ({type(error).__name__})."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ConfigurationError(f"{key}: '{path}' holds no tensors by name.")
    return loaded
