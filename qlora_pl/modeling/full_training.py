"""``lora.method: none``: every weight of an unquantised base is trained, kept in float32.

The baseline that adapters are compared with. In pure bfloat16 it hardly trains: at a learning rate
of 1e-5 two in a hundred weights move in three steps, the other updates are rounded away.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig

logger = logging.getLogger(__name__)


def refuse_packed_weights(quantization: QuantizationConfig, lora: LoRAConfig) -> None:
    """Packed codes have no gradient, so only an unquantised base can be trained whole.

    Raises:
        ConfigurationError: if the base is quantised.
    """
    if not lora.has_adapters and quantization.is_quantized:
        raise ConfigurationError(
            f"model.lora.method: none trains the base itself, whose {quantization.quant_type} "
            "weights have no gradient; set model.quantization.quant_type: none, or train adapters."
        )


def train_all_weights(model: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
    """Let every floating-point weight of a loaded base be trained; returns the model.

    Raises:
        ConfigurationError: if the weights are kept in 16 bits and multiplied in another type.
    """
    model.requires_grad_(True)
    if next(model.parameters()).dtype == torch.bfloat16:
        if compute_dtype != torch.bfloat16:
            name = str(compute_dtype).split(".")[-1]
            raise ConfigurationError(
                f"model.lora.dtype: bfloat16 weights that are trained themselves are multiplied in "
                f"bfloat16, not in {name}; set it to float32, or "
                "model.quantization.compute_dtype to bfloat16."
            )
        logger.warning(
            "model.lora.dtype: bfloat16 keeps the trained weights themselves in 8 bits of "
            "precision; at usual learning rates most updates are rounded away."
        )
    return model
