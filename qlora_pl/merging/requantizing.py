"""Merged matrices -> the 4-bit codes that transformers loads as they are (``--requantize``).

What is written is what ``save_pretrained`` writes of a model that was loaded in 4 bits, without the
model: each matrix is packed when it comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.quantization import QuantizationConfig, packed_bytes
from qlora_pl.modeling.base.quantization_plan import QuantizationPlan, plan_quantization
from qlora_pl.modeling.base.structure import is_conv1d
from qlora_pl.modeling.loading.base_loading import bitsandbytes_config
from qlora_pl.modeling.loading.packed_model import packed_tensors

FourBits = Literal["nf4", "fp4"]


@dataclass(frozen=True)
class Packing:
    """Which matrices of a merged model are packed, and how."""

    config: QuantizationConfig
    plan: QuantizationPlan
    transposed: frozenset[str]
    """Those that lie as GPT-2's do; the loader wants them the other way round."""

    def settings(self, dtype: torch.dtype) -> Any:
        """What config.json has to say for plain programs: a ``BitsAndBytesConfig``."""
        return bitsandbytes_config(self.config, dtype, self.plan)

    def num_bytes(self, name: str, number: int, dtype: torch.dtype) -> float:
        """What a tensor of so many elements takes on the disk."""
        if name in self.plan.quantized:
            return packed_bytes(number, self.config)
        return float(number * dtype.itemsize)

    def groups(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Each tensor alone, or its codes and what they are decoded with."""
        for name, tensor in tensors:
            if name in self.plan.quantized:
                yield dict(packed_tensors(name, self._packed(name, tensor)))
            else:
                yield {name: tensor}

    def _packed(self, name: str, tensor: Tensor) -> nn.Parameter:
        import bitsandbytes as bnb  # slow to import

        matrix = tensor.t().contiguous() if name in self.transposed else tensor
        return bnb.nn.Params4bit(
            matrix,
            requires_grad=False,
            blocksize=self.config.block_size,
            compress_statistics=self.config.uses_double_quant,
            quant_type=self.config.quant_type,
        ).to("cpu")


def plan_packing(
    skeleton: nn.Module, quant_type: FourBits, skip_modules: tuple[str, ...] = ()
) -> Packing:
    """Decide which matrices are packed: those that training would pack.

    Args:
        skeleton: The merged model's, see ``build_skeleton``.
        quant_type: nf4 or fp4, with double quantisation, in blocks that plain programs read.
        skip_modules: What stays in 16 bits, as it did in training.

    Raises:
        ConfigurationError: if plain transformers could not load such a folder, or a matrix cannot
            be packed.
    """
    config = QuantizationConfig(quant_type=quant_type)
    try:
        plan = plan_quantization(skeleton, replace(config, skip_modules=skip_modules))
    except ConfigurationError as error:
        raise ConfigurationError(
            f"--requantize: this model cannot be packed in 4 bits; leave it out. ({error})"
        ) from error
    if plan.replaced_classes:
        names = ", ".join(name.rpartition(".")[2] for name in plan.replaced_classes)
        raise ConfigurationError(
            f"--requantize: plain transformers knows no 4-bit {names} and could not load the "
            "folder; leave it out."
        )
    owners = {name: skeleton.get_submodule(name.rpartition(".")[0]) for name in plan.quantized}
    turned = frozenset(name for name, owner in owners.items() if is_conv1d(owner))
    return Packing(replace(config, skip_modules=skip_modules), plan, turned)
