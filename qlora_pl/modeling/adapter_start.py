"""Where an adapter's training begins: at the activations' main directions, or at another adapter.

Both leave B's part of the outcome exact: EVA starts with B = 0, so at the base's own outputs; an
adapter to go on from is copied as it is, after its base, ranks and modules were compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.batch import Batch
from qlora_pl.errors import AdapterFolderError, ConfigurationError
from qlora_pl.modeling.adapter_folder import WEIGHTS, read_adapter_folder
from qlora_pl.modeling.adapters import LoRAConfig
from qlora_pl.modeling.identity import BaseIdentity

PICKLED = "adapter_model.bin"
COMPARED = {
    "r": "r",
    "alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "bias": "bias",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
"""This project's keys, and PEFT's, that must be the same in an adapter to go on from."""


EVA_BATCHES = 16
"""Batches of the first training rows that EVA looks at, over and over until it settles."""


def start_adapters(module: Any) -> None:
    """Begin a fresh run of a ``QLoRAModule`` where ``model.lora`` says."""
    config = module.lora
    if config.init_from is not None:
        start_at_adapter(module.model, module.start)
    elif config.init == "eva" and module.trainer.state.fn == "fit":
        batches = module.trainer.datamodule.first_batches(EVA_BATCHES)
        start_at_activations(module.model, batches, config)


# -- EVA -------------------------------------------------------------------------------------------


def start_at_activations(model: nn.Module, batches: Sequence[Batch], config: LoRAConfig) -> None:
    """Set every A to the directions in which its layer's inputs vary most (EVA).

    Paischer et al. 2024 (arXiv:2410.07170), with equal ranks (rho = 1), so that a checkpoint's
    shapes are known before.

    Args:
        model: A PEFT model with ``init="eva"``; B is zero and stays so.
        batches: Rows to run; gone through again until the directions settle.
        config: Its adapters.

    Raises:
        ConfigurationError: if a batch has fewer tokens than the largest rank, from which its
            directions cannot be found.
    """
    import peft  # slow to import

    rank = max([config.r, *config.rank_pattern.values()])
    sizes = [int(batch["attention_mask"].sum()) for batch in batches]
    if max(sizes, default=0) < rank:
        raise ConfigurationError(
            f"model.lora.init: eva needs a batch of at least {rank} tokens (the largest rank), and "
            f"the first ones have up to {max(sizes, default=0)}; raise data.batch_size or lower "
            "model.lora.r."
        )
    inputs = [
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        for batch, size in zip(batches, sizes, strict=True)
        if size >= rank
    ]
    directions = peft.get_eva_state_dict(
        model,
        inputs,
        forward_fn=lambda adapted, row: adapted(**row, use_cache=False),
        gather_distributed_inputs=False,  # every rank runs the same rows
    )
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer) and name in directions:
                module.lora_A["default"].weight.copy_(directions.pop(name))
    assert not directions, f"no adapter for {sorted(directions)[:3]}"


# -- another adapter -------------------------------------------------------------------------------


def locate_adapter(name: str) -> Path:
    """The folder of an adapter: the one named, or the Hub's snapshot.

    Raises:
        ConfigurationError: if it is neither, or holds no adapter.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _snapshot(name)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"model.lora.init_from: '{name}' holds no adapter (no adapter_config.json)."
        )
    return folder


def _snapshot(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigurationError(f"model.lora.init_from: no folder '{name}'.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", WEIGHTS, PICKLED]))
    except Exception as error:  # the client raises a dozen unrelated types
        raise ConfigurationError(
            f"model.lora.init_from: '{name}' is neither a folder here nor an adapter that could be "
            f"fetched from the Hub ({type(error).__name__})."
        ) from error


def refuse_other_adapter(folder: Path, config: LoRAConfig, base: BaseIdentity) -> None:
    """An adapter to go on from must be of this base and of these settings.

    Raises:
        ConfigurationError: naming each difference with both values.
    """
    saved = json.loads((folder / "adapter_config.json").read_text())
    problems = []
    if (folder / "manifest.json").is_file():
        try:
            manifest = read_adapter_folder(folder)
        except AdapterFolderError as error:
            raise ConfigurationError(f"model.lora.init_from: {error}") from error
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
    asked: dict[str, Any] = {key: getattr(config, key) for key in COMPARED}
    method = "dora" if saved.get("use_dora") else "lora"
    pairs = [("method", method, config.method)]
    pairs += [(key, saved.get(theirs), asked[key]) for key, theirs in COMPARED.items()]
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

    tensors = _read(folder)
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
    dtypes = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}
    peft.set_peft_model_state_dict(model, dtypes)


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file():
        return load_file(folder / WEIGHTS)
    if (folder / PICKLED).is_file():
        loaded: dict[str, Tensor] = torch.load(
            folder / PICKLED, map_location="cpu", weights_only=True
        )
        return loaded
    raise ConfigurationError(f"model.lora.init_from: '{folder}' has no {WEIGHTS}.")


def _targets(folder: Path) -> str:
    targets = json.loads((folder / "adapter_config.json").read_text()).get("target_modules")
    parts = targets if isinstance(targets, list) else [str(targets)]
    return ", ".join(sorted({re.sub(r".*\.", "", part) for part in parts}))
