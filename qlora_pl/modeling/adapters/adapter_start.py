"""Where an adapter's training begins: at the activations' main directions, or at another adapter.

EVA leaves B at zero, so that training starts at the base's own outputs; an adapter to go on from is
copied as it is, after its base, ranks and modules were compared.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qlora_pl.errors import AdapterFolderError, ConfigurationError
from qlora_pl.modeling.adapters.eva import start_at_activations
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.identity import BaseIdentity
from qlora_pl.modeling.base.names import by_module
from qlora_pl.modeling.folders.adapter_folder import read_adapter_folder
from qlora_pl.modeling.folders.peft_folder import (
    locate_adapter,
    other_kind,
    read_config,
    read_tensors,
)

COMPARED = {
    "r": "r",
    "alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "bias": "bias",
}
"""This project's keys, and PEFT's, that must be the same in an adapter to go on from."""
EVA_BATCHES = 16
"""Batches of the first training rows that EVA looks at."""


Start = Path | ConfigurationError | Literal["eva"] | None
"""What is still to be done before the first step: copy a folder, complain, look at rows."""


def find_start(config: LoRAConfig, base: BaseIdentity, targets: list[str]) -> Start:
    """What a run begins with, unless it is resumed.

    An error is not raised yet: a resumed run does without the folder, which may be gone by then.
    """
    if config.init_from is None:
        return "eva" if config.init == "eva" else None
    try:
        folder = locate_adapter(config.init_from)
        refuse_other_adapter(folder, config, base, targets)
    except ConfigurationError as error:
        return error
    return folder


def start_adapters(module: Any) -> None:
    """Do what a ``QLoRAModule`` begins with, once; nothing if a checkpoint has brought it all.

    Raises:
        ConfigurationError: if it cannot begin as ``model.lora`` says.
    """
    start, trainer = module.start, module.trainer
    if trainer.ckpt_path is None:
        if isinstance(start, ConfigurationError):
            raise start
        if isinstance(start, Path):
            start_at_adapter(module.model, start)
        if start == "eva":
            if trainer.state.fn != "fit":
                return  # B is zero, so that A does not matter; its rows may not be there
            start_at_activations(module.model, trainer.datamodule.first_batches(EVA_BATCHES))
            _share(module.trained_tensors(), trainer.world_size)
    module.start = None


def _share(tensors: dict[str, nn.Parameter], world_size: int) -> None:
    # Each device has computed them, perhaps not to the last bit.
    for tensor in tensors.values() if world_size > 1 else ():
        torch.distributed.broadcast(tensor.data, src=0)


def refuse_other_adapter(
    folder: Path, config: LoRAConfig, base: BaseIdentity, targets: list[str]
) -> None:
    """An adapter to go on from must be of this base and of these settings.

    Args:
        folder: From ``locate_adapter``.
        config: This run's adapters.
        base: This run's base.
        targets: The modules that this run adapts.

    Raises:
        ConfigurationError: naming each difference with both values.
    """
    manifest = None
    if (folder / "manifest.json").is_file():
        try:
            manifest = read_adapter_folder(folder)
        except AdapterFolderError as error:
            raise ConfigurationError(f"model.lora.init_from: {error}") from error
    saved = read_config(folder)
    problems = []
    if manifest is not None:
        if manifest.base["weights"] != base.weights:
            problems.append(
                f"model.lora.init_from: '{folder}' was trained on other weights than '{base.name}' "
                f"(fingerprints {manifest.base['weights'][:12]} and {base.weights[:12]}); name its "
                "base."
            )
    elif Path(str(saved.get("base_model_name_or_path"))).name != Path(base.name).name:
        problems.append(
            f"model.lora.init_from: '{folder}' says that its base is "
            f"'{saved.get('base_model_name_or_path')}', and this run's is '{base.name}'; name its "
            "base (or correct its adapter_config.json, if that is the same model)."
        )
    problems += other_kind(folder, saved)
    method = "dora" if saved.get("use_dora") else "lora"
    pairs: list[tuple[str, Any, Any]] = [("method", method, config.method)]
    pairs += [(key, saved.get(theirs), getattr(config, key)) for key, theirs in COMPARED.items()]
    for key in ("rank_pattern", "alpha_pattern"):
        theirs, ours = saved.get(key) or {}, getattr(config, key)
        if by_module(theirs, targets, None) != by_module(ours, targets, None):
            pairs.append((key, theirs, ours))
    problems += [
        f"model.lora.init_from: '{folder}' has {key} {theirs}, this run has {ours}; use the "
        "adapter's."
        for key, theirs, ours in pairs
        if (theirs or None) != (ours or None)
    ]
    if problems:
        raise ConfigurationError(problems)


def start_at_adapter(model: nn.Module, folder: Path) -> None:
    """Copy an adapter's tensors into a model's adapters.

    Args:
        model: A PEFT model with adapters of the same modules and ranks.
        folder: A PEFT folder, with or without this project's manifest.

    Raises:
        ConfigurationError: naming a tensor that one of them lacks, or another shape.
    """
    import peft  # slow to import

    tensors = read_tensors(folder)
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, unused = sorted(own.keys() - tensors), sorted(tensors.keys() - own)
    if missing or unused:
        which = f"lacks '{missing[0]}'" if missing else f"has '{unused[0]}' besides"
        raise ConfigurationError(
            f"model.lora.init_from: '{folder}' adapts other modules than this run: it {which} "
            f"({len(missing) + len(unused)} such); use its target modules "
            f"({_targets(folder)})."
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ConfigurationError(
                f"model.lora.init_from: '{folder}' has '{name}' of shape {tuple(tensor.shape)}, "
                f"this run needs {tuple(own[name].shape)}; use its ranks."
            )
    cast = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}
    peft.set_peft_model_state_dict(model, cast)


def _targets(folder: Path) -> str:
    targets = read_config(folder).get("target_modules")
    parts = targets if isinstance(targets, list) else [str(targets)]
    return ", ".join(sorted({re.sub(r".*\.", "", part) for part in parts}))
