"""Has transformers' loader replace exactly the linear modules of a plan by bitsandbytes' layers.

Left alone it replaces what is ``nn.Linear`` and nothing derived from it: a Falcon under
``load_in_4bit`` stays in 16 bits, without a word. Its block size cannot be chosen there either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from qlora_pl.modeling.plan import QuantizationPlan
from qlora_pl.modeling.quantization import INT8_OUTLIER_THRESHOLD, QuantizationConfig
from qlora_pl.modeling.structure import is_conv1d

METHODS = ("bitsandbytes_4bit", "bitsandbytes_8bit")


@contextmanager
def planned_replacement(
    plan: QuantizationPlan, config: QuantizationConfig, compute_dtype: torch.dtype
) -> Iterator[None]:
    """Within the block, ``from_pretrained`` quantises what the plan says, no more and no less."""
    from transformers.quantizers import auto  # slow to import

    mapping = auto.AUTO_QUANTIZER_MAPPING
    before = {method: mapping[method] for method in METHODS}

    def replace(self: Any, model: nn.Module, **_: Any) -> None:
        self.modules_to_not_convert = plan.kept_modules
        for name in plan.quantized:
            owner = name.rpartition(".")[0]
            module = model.get_submodule(owner)
            layer = _empty_layer(module, config, compute_dtype, self.pre_quantized)
            model.set_submodule(owner, layer)

    for method, quantizer in before.items():
        planned = type(
            f"Planned{quantizer.__name__}",
            (quantizer,),
            {"_process_model_before_weight_loading": replace},
        )
        mapping[method] = planned
    try:
        yield
    finally:
        mapping.update(before)


def _empty_layer(
    module: Any, config: QuantizationConfig, compute_dtype: torch.dtype, is_packed: bool
) -> nn.Module:
    """The bitsandbytes layer that is to take a module's place, without weights."""
    import bitsandbytes as bnb  # slow to import

    is_conv = is_conv1d(module)
    inputs, outputs = module.weight.shape if is_conv else module.weight.shape[::-1]
    has_bias = module.bias is not None
    storage_dtype = getattr(torch, config.storage_dtype)
    layer: Any
    with torch.device("meta"):
        if config.is_four_bits:
            layer = bnb.nn.Linear4bit(
                inputs,
                outputs,
                has_bias,
                compute_dtype,
                compress_statistics=config.uses_double_quant,
                quant_type=config.quant_type,
                quant_storage=storage_dtype,
            )
            layer.weight.blocksize = config.block_size
            if is_packed:  # tensors are cast to the type of what they replace
                layer.weight.data = layer.weight.data.to(storage_dtype)
        else:
            layer = bnb.nn.Linear8bitLt(
                inputs,
                outputs,
                has_bias,
                has_fp16_weights=False,
                threshold=INT8_OUTLIER_THRESHOLD,
            )
            if is_packed:
                layer.weight.data = layer.weight.data.to(torch.int8)
    layer.source_cls = type(module) if is_conv else nn.Linear  # the loader transposes a Conv1D's
    layer.requires_grad_(False)
    return cast(nn.Module, layer)
