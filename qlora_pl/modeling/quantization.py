"""Weights in four bits: what a run chooses, and what it costs in memory.

One block size (64, and 256 for the scales), because transformers' loader offers no other: a setting
that could not be honoured would be worse than none. ``reference_quantizer`` has the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qlora_pl.errors import ConfigurationError

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

BLOCK_SIZE = 64
"""Weights that share one scale."""
ABSMAX_BLOCK_SIZE = 256
"""Scales that share one second-level scale under double quantisation."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the frozen base is stored and multiplied."""

    quant_type: Literal["nf4", "fp4", "none"] = "nf4"
    """Code of the frozen weights: NormalFloat, E2M1 float, or none (16 bits, ordinary LoRA)."""

    double_quant: bool = True
    """Quantise the scales too, to 8 bits: saves 0.373 bit per weight (QLoRA, section 3)."""

    compute_dtype: ComputeDtype = "auto"
    """Dtype of the matrix products. auto: bfloat16 where the device multiplies it natively, else
    float16 on CUDA, else float32."""

    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """Dtype that the packed bytes are declared as. uint8, because a cast must never touch them: a
    word that looks like NaN comes back changed (bitsandbytes #1945)."""

    skip_modules: tuple[str, ...] = ()
    """Modules kept in 16 bits besides the head: full names or last components. The start-up summary
    lists them."""

    cache: bool = True
    """Keep the packed weights on disk, so that the next start need not quantise."""

    def __post_init__(self) -> None:
        if self.is_quantized:
            return
        problems = []
        if self.skip_modules:
            problems.append(
                f"model.quantization.skip_modules: {list(self.skip_modules)} has no effect with "
                "quant_type: none, which quantises nothing. Remove it or set quant_type: nf4."
            )
        if self.storage_dtype != "uint8":
            problems.append(
                f"model.quantization.storage_dtype: {self.storage_dtype} has no effect with "
                "quant_type: none, which packs no bytes. Remove it or set quant_type: nf4."
            )
        if problems:
            raise ConfigurationError(problems)

    @property
    def is_quantized(self) -> bool:
        """Whether the base is stored in four bits."""
        return self.quant_type != "none"


def resolve_compute_dtype(name: ComputeDtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products; only ``auto`` depends on ``device``."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        # Emulated bfloat16 (before Ampere) is far slower than float16.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        # torch has no public question for this up to 2.13.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def bits_per_weight(config: QuantizationConfig) -> float:
    """Return the bits of a quantised weight with its share of the scales: 4.127 or 4.5.

    QLoRA (arXiv:2305.14314), section 3, "Double Quantization": a float32 scale for 64 weights costs
    0.5 bit; in 8 bits, with a float32 for 256 of them, 8/64 + 32/(64 * 256) = 0.127 bit. Only for a
    quantised config: what an unquantised weight takes is its dtype's size, which is not known here.
    """
    assert config.is_quantized
    if not config.double_quant:
        return 4 + 32 / BLOCK_SIZE
    return 4 + 8 / BLOCK_SIZE + 32 / (BLOCK_SIZE * ABSMAX_BLOCK_SIZE)


def packed_bytes(num_weights: int, config: QuantizationConfig) -> float:
    """Return the bytes of ``num_weights`` quantised weights, scales included.

    0.5 + 1/64 + 4/(64 * 256) bytes per weight with double quantisation, 0.5 + 4/64 without (QLoRA,
    section 3). Left out: about 1 kB per weight matrix for its tables and its offset.
    """
    return num_weights * bits_per_weight(config) / 8
