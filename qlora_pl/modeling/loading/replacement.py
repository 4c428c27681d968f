"""Has transformers' loader replace exactly the linear modules of a plan by bitsandbytes' layers.

Left alone it replaces what is ``nn.Linear`` and nothing derived from it: a Falcon under
``load_in_4bit`` stays in 16 bits, without a word. Its block size cannot be chosen there either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from qlora_pl.modeling.base.quantization import INT8_OUTLIER_THRESHOLD, QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import QuantizationPlan
from qlora_pl.modeling.base.structure import is_conv1d

PutAway = Callable[[str, nn.Parameter], nn.Parameter]
METHODS = ("bitsandbytes_4bit", "bitsandbytes_8bit")


@contextmanager
def planned_replacement(
    plan: QuantizationPlan,
    config: QuantizationConfig,
    compute_dtype: torch.dtype,
    quantize_on: torch.device | None = None,
    put_away: PutAway | None = None,
) -> Iterator[None]:
    """Within the block, ``from_pretrained`` quantises what the plan says, no more and no less.

    Args:
        plan: From ``make_plan``.
        config: How to quantise.
        compute_dtype: Of the matrix products.
        quantize_on: The device that quantises, where the model is to lie on another; None: its own.
        put_away: Given each 4-bit matrix that was made; what it returns is the model's.
    """
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

    methods: dict[str, Any] = {"_process_model_before_weight_loading": replace}
    if quantize_on is not None and config.is_four_bits:
        methods["get_quantize_ops"] = lambda self: _elsewhere(self, quantize_on, put_away)
    for method, quantizer in before.items():
        mapping[method] = type(f"Planned{quantizer.__name__}", (quantizer,), methods)
    try:
        yield
    finally:
        mapping.update(before)


def _elsewhere(quantizer: Any, device: torch.device, put_away: PutAway | None) -> Any:
    """The quantising step of transformers, taken on another device than the model's."""
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize  # slow to import

    class QuantizeElsewhere(Bnb4bitQuantize):
        def convert(self, input_dict: dict[str, Any], **arguments: Any) -> dict[str, Any]:
            moved = {name: _one(value).to(device) for name, value in input_dict.items()}
            quantized = super().convert(moved, **arguments)
            made = {name: weight.to("cpu") for name, weight in quantized.items()}
            if put_away is None:
                return made
            return {name: put_away(name, weight) for name, weight in made.items()}

    return QuantizeElsewhere(quantizer)


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


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
