"""A base to be measured: read through the pages of its files, or loaded whole to be asked.

Without data no matrix but the one in hand needs memory of its own, so a base may be larger than the
host's. What is damaged, or quantised already, is refused before anything long is done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.machine import best_device
from qlora_pl.modeling.base.identity import (
    locate_base,
    safetensors_header,
    stored_dtype,
    weight_files,
)
from qlora_pl.modeling.base.prequantized import STATE, is_prequantized, stored_quantization
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import (
    QuantizationPlan,
    build_skeleton,
    plan_quantization,
)
from qlora_pl.modeling.base.structure import is_conv1d
from qlora_pl.modeling.loading.base_loading import from_pretrained

logger = logging.getLogger(__name__)

NAMED = 5
"""Damaged tensors that are named."""


@dataclass(frozen=True)
class OpenBase:
    """A base whose matrices can be read one by one."""

    name: str
    folder: Path
    model: Any
    plan: QuantizationPlan
    device: torch.device
    """Where matrices are quantised."""
    skipped: tuple[str, ...] = ()
    """What is not to be quantised in any case, as it was named."""

    @property
    def modules(self) -> list[str]:
        """What a run would quantise, in the order of the model."""
        return [name.rpartition(".")[0] for name in self.plan.quantized]

    def matrix(self, module: str) -> Tensor:
        """``(out, in)`` float32 of its own, on the device."""
        owner = self.model.get_submodule(module)
        weight: Tensor = owner.weight.detach()
        weight = weight.t() if is_conv1d(owner) else weight
        return weight.to(self.device, torch.float32).contiguous()

    def inputs(self, module: str) -> int:
        """Of a module's matrix."""
        owner = self.model.get_submodule(module)
        return int(owner.weight.shape[0 if is_conv1d(owner) else 1])


def open_folder(
    name: str,
    revision: str | None = None,
    skip_modules: tuple[str, ...] = (),
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> OpenBase:
    """Open a base to read its matrices, whose pages stay in its files.

    Raises:
        ConfigurationError: if it is no model, is damaged, or is quantised already.
    """
    folder = locate_base(name, revision, cache_dir)
    plan = plan_of(name, folder, skip_modules, trust_remote_code)
    model = from_pretrained(
        folder,
        {
            "device_map": {"": "cpu"},
            "dtype": stored_dtype(folder),
            "attn_implementation": "eager",
            "trust_remote_code": trust_remote_code,
        },
    )
    refuse_damaged(model, name)
    return OpenBase(name, folder, model, plan, best_device(), skip_modules)


def plan_of(
    name: str, folder: Path, skip_modules: tuple[str, ...], trust_remote_code: bool
) -> QuantizationPlan:
    """What a run would quantise of a base, in blocks of 64.

    Raises:
        ConfigurationError: if it is quantised already, or holds what cannot be quantised.
    """
    if is_prequantized(folder):
        raise ConfigurationError(_quantised_already(name, folder))
    skeleton = build_skeleton(folder, "auto", trust_remote_code)
    # int8 has no blocks that a row must hold whole: which sizes fit is asked of each format.
    config = QuantizationConfig(quant_type="int8", skip_modules=skip_modules)
    return plan_quantization(skeleton, config)


def _quantised_already(name: str, folder: Path) -> str:
    stored = stored_quantization(folder)
    how = "by another program than bitsandbytes"
    if stored is not None:
        how = stored.quant_type
        tensors = [
            tensor
            for path in weight_files(folder)
            if path.suffix != ".bin"
            for tensor in safetensors_header(path)[0]
        ]
        codes = [tensor for tensor in tensors if STATE in tensor or tensor.endswith(".SCB")]
        how += " with double quantisation" if stored.uses_double_quant else ""
        how += f", {len(codes)} matrices"
    return (
        f"--model: '{name}' is quantised already ({how}): it holds the codes and not the weights "
        "that they stand for, so its error cannot be told from it; name the model in 16 bits."
    )


def refuse_damaged(model: nn.Module, name: str) -> None:
    """Refuse a base with values that are no numbers.

    Raises:
        ConfigurationError: naming the tensors, and how many of each.
    """
    damaged: list[str] = []
    for tensor, parameter in model.named_parameters():
        wrong = sum(
            int((~piece.isfinite()).sum()) for piece in parameter.detach().flatten().split(2**24)
        )
        if wrong:
            damaged.append(f"{tensor} ({wrong:,} of {parameter.numel():,})")
    if damaged:
        more = f" and {len(damaged) - NAMED:,} more" if len(damaged) > NAMED else ""
        tensors = "1 tensor" if len(damaged) == 1 else f"{len(damaged):,} tensors"
        raise ConfigurationError(
            f"--model: '{name}' holds values that are NaN or infinite in {tensors}: "
            f"{', '.join(damaged[:NAMED])}{more}; such a base trains nothing, fetch it again."
        )
