"""An adapter of PEFT's -> the same changes as a LoRA whose one scale is alpha / r everywhere.

Engines that serve adapters read ``r`` and ``lora_alpha`` and little else: rank-stabilised scales,
and ranks or alphas of some modules, are left out without a word. So each module's scale goes into
its B, and ranks are filled up with zeros; what no such folder can say is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_pl.errors import ConfigurationError
from qlora_pl.files import share_as_folder
from qlora_pl.inference.source import KEY
from qlora_pl.modeling.folders.adapter_folder import WEIGHTS, AdapterManifest
from qlora_pl.modeling.folders.peft_folder import other_kind, read_config, read_tensors

A, B = ".lora_A.weight", ".lora_B.weight"
PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""
MERGED_INSTEAD = "export it merged into its base (--form merged)"
RESET = {
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_dropout": 0.0,  # of training
    "init_lora_weights": True,
    "inference_mode": True,
}


@dataclass(frozen=True)
class PlainAdapter:
    """Tensors and settings of a LoRA that every program reads alike."""

    tensors: dict[str, Tensor]
    """A ``(r, in)`` and B ``(out, r)`` by PEFT's names, float32."""
    config: dict[str, Any]
    """``adapter_config.json``."""
    is_changed: bool
    """Whether it had to be put in other words than the adapter's own."""

    @property
    def rank(self) -> int:
        """Of every module."""
        return int(self.config["r"])

    def write(self, folder: Path) -> None:
        """As a PEFT folder, which exists already."""
        from safetensors.torch import save_file

        save_file(self.tensors, folder / WEIGHTS, metadata={"format": "pt"})
        share_as_folder(folder / WEIGHTS)
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def plain_adapter(folder: Path, manifest: AdapterManifest | None = None) -> PlainAdapter:
    """Resolve every scale of an adapter.

    Args:
        folder: Of any PEFT LoRA.
        manifest: Beside it; None: it has none.

    Raises:
        ConfigurationError: if it is more than A and B of matrices, naming what, and what to do.
    """
    config = read_config(folder, KEY)
    tensors = read_tensors(folder, KEY)
    if problems := other_kind(folder, config, KEY):
        raise ConfigurationError(problems)
    if reasons := more_than_matrices(config, tensors, manifest):
        raise ConfigurationError(
            f"{KEY}: '{folder}' {' and '.join(reasons)}, which engines do not read of an adapter "
            f"alone; {MERGED_INSTEAD}."
        )
    modules = sorted(name.removesuffix(A) for name in tensors if name.endswith(A))
    scales = {name: scale_of(name, config, tensors[name + A].shape[0]) for name in modules}
    ranks = {name: tensors[name + A].shape[0] for name in modules}
    written = {"r": config["r"], "lora_alpha": config["lora_alpha"]}
    if set(ranks.values()) == {written["r"]} and set(scales.values()) == {
        written["lora_alpha"] / written["r"]
    }:
        kept = {name: tensor.float().contiguous() for name, tensor in sorted(tensors.items())}
        return PlainAdapter(kept, config | RESET, is_changed=False)
    rank = max(ranks.values())
    folded: dict[str, Tensor] = {}
    for name in modules:
        a, b = tensors[name + A].double(), tensors[name + B].double() * scales[name]
        missing = rank - ranks[name]
        folded[name + A] = torch.nn.functional.pad(a, (0, 0, 0, missing)).float()
        folded[name + B] = torch.nn.functional.pad(b, (0, missing)).float()
    return PlainAdapter(folded, config | RESET | {"r": rank, "lora_alpha": rank}, is_changed=True)


def scale_of(module: str, config: Mapping[str, Any], rank: int) -> float:
    """What PEFT multiplies BA by.

    Args:
        module: Its name among the tensors.
        config: ``adapter_config.json``.
        rank: Of this module's A.
    """
    from peft.utils.other import get_pattern_key  # slow to import

    patterns = config.get("alpha_pattern") or {}
    key = get_pattern_key(patterns.keys(), module.removeprefix(PREFIX))
    alpha = patterns.get(key, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def more_than_matrices(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], manifest: AdapterManifest | None
) -> list[str]:
    """What an adapter changes beside adding BA to matrices, a clause each; empty: nothing."""
    reasons = []
    if config.get("use_dora"):
        reasons.append("is a DoRA, which rescales rows of the base")
    if config.get("target_parameters"):
        reasons.append("adapts parameters that are no matrices (target_parameters)")
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases or config.get("bias", "none") != "none":
        reasons.append("brings trained biases")
    if manifest is not None and manifest.vocabulary_size is not None:
        reasons.append(f"belongs to a base of {manifest.vocabulary_size:,} tokens, not its own")
    rest = [
        name
        for name in tensors
        if not name.endswith((A, B)) and name not in biases and "lora_magnitude_vector" not in name
    ]
    if rest:
        reasons.append(f"changes the base itself ('{sorted(rest)[0].removeprefix(PREFIX)}')")
    return reasons
