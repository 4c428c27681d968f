"""How the base's weights are kept: what a run chooses, and what it costs in memory.

In: the keys of ``model.quantization``. Out: a checked choice, bits a weight, bytes.
``reference_quantizer`` has the arithmetic of the 4-bit codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qlora_pl.errors import ConfigurationError

QuantType = Literal["nf4", "fp4", "int8", "none"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

BLOCK_SIZE = 64
"""Weights that share one scale, by default: the paper's, and all that plain transformers has."""
ABSMAX_BLOCK_SIZE = 256
"""Scales that share one second-level scale under double quantisation."""
INT8_OUTLIER_THRESHOLD = 6.0
"""Inputs beyond it are multiplied in 16 bits (Dettmers et al. 2022, arXiv:2208.07339, 3.2)."""
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the frozen base is stored and multiplied."""

    quant_type: QuantType = "nf4"
    """Code of the frozen weights: NormalFloat, E2M1 float, LLM.int8 (8 bits, a scale a row), or
    none (ordinary LoRA over 16 or 32 bits, or full fine-tuning)."""

    double_quant: bool | None = None
    """Quantise the scales too, to 8 bits: saves 0.373 bit per weight (QLoRA, section 3). None:
    yes for nf4 and fp4; the other kinds have no such scales."""

    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale (4 bits only). 64 is the paper's, and the only size that plain
    transformers programs can quantise to; a larger one saves up to 0.12 bit and costs accuracy."""

    compute_dtype: ComputeDtype = "auto"
    """Dtype of the matrix products. auto: bfloat16 where the device multiplies it natively, else
    float16 on CUDA (with a loss scaler), else float32."""

    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """Dtype that the packed bytes are declared as. uint8, because a cast must never touch them: a
    word that looks like NaN comes back changed (bitsandbytes #1945)."""

    skip_modules: tuple[str, ...] = ()
    """Modules kept unquantised besides the head: full names or last components. The start-up
    summary lists them."""

    cache: bool = True
    """Keep the packed weights on disk (``model.cache_dir``), so that the next start need not
    quantise."""

    def __post_init__(self) -> None:
        kind = f"quant_type: {self.quant_type}"
        set_in_vain = []
        if self.skip_modules and not self.is_quantized:
            set_in_vain.append(f"skip_modules: {list(self.skip_modules)}")
        if not self.is_four_bits:
            if self.double_quant:
                set_in_vain.append("double_quant: True")
            if self.storage_dtype != "uint8":
                set_in_vain.append(f"storage_dtype: {self.storage_dtype}")
            if self.block_size != BLOCK_SIZE:
                set_in_vain.append(f"block_size: {self.block_size}")
        if set_in_vain:
            raise ConfigurationError(
                [
                    f"model.quantization.{setting} has no effect with {kind}, which "
                    f"{_HAS_NONE[self.quant_type]}. Remove it or set quant_type: nf4."
                    for setting in set_in_vain
                ]
            )

    @property
    def is_quantized(self) -> bool:
        """Whether the base is stored in eight or four bits."""
        return self.quant_type != "none"

    @property
    def is_four_bits(self) -> bool:
        """Whether the base is stored in four bits."""
        return self.quant_type in ("nf4", "fp4")

    @property
    def uses_double_quant(self) -> bool:
        """Whether the scales are quantised as well."""
        return self.is_four_bits and self.double_quant is not False


_HAS_NONE = {
    "int8": "keeps one float32 scale a row and no packed bytes",
    "none": "quantises nothing",
}


def resolve_compute_dtype(name: ComputeDtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products; only ``auto`` depends on ``device``."""
    if name != "auto":
        return COMPUTE_DTYPES[name]
    if device.type == "cuda":
        # Emulated bfloat16 (before Ampere) is far slower than float16.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        # torch has no public question for this up to 2.13.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def compute_advice(name: ComputeDtype, device: torch.device) -> str | None:
    """A sentence on a choice that is honoured but worth a second look; None: there is none."""
    dtype = resolve_compute_dtype(name, device)
    key = "model.quantization.compute_dtype"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if dtype == torch.bfloat16 and not native:
            return (
                f"{key}: this GPU only emulates bfloat16, many times slower than float16; auto "
                "takes float16, with a loss scaler."
            )
        if dtype == torch.float16 and name == "auto":
            return f"{key}: auto is float16, with a loss scaler; this GPU has no native bfloat16."
        if dtype == torch.float16 and native:
            return f"{key}: this GPU has bfloat16, which needs no loss scaler and cannot overflow."
    if device.type == "cpu" and dtype == torch.float16:
        return f"{key}: float16 on a CPU is slow, and fit for trying things out alone."
    return None


def bits_per_weight(config: QuantizationConfig) -> float:
    """Return the bits of a quantised weight with its share of the scales: 4.127 or 4.5, or 8.

    QLoRA (arXiv:2305.14314), section 3, "Double Quantization": a float32 scale for 64 weights costs
    0.5 bit; in 8 bits, with a float32 for 256 of them, 8/64 + 32/(64 * 256) = 0.127 bit. LLM.int8's
    float32 scale a row depends on the rows' width and is left out. Only for a quantised config:
    what an unquantised weight takes is its dtype's size, which is not known here.
    """
    assert config.is_quantized
    if not config.is_four_bits:
        return 8.0
    if not config.uses_double_quant:
        return 4 + 32 / config.block_size
    return 4 + 8 / config.block_size + 32 / (config.block_size * ABSMAX_BLOCK_SIZE)


def packed_bytes(num_weights: int, config: QuantizationConfig) -> float:
    """Return the bytes of ``num_weights`` quantised weights, scales of blocks included.

    0.5 + 1/64 + 4/(64 * 256) bytes per weight with double quantisation, 0.5 + 4/64 without (QLoRA,
    section 3). Left out: about 1 kB per weight matrix for its tables and its offset.
    """
    return num_weights * bits_per_weight(config) / 8
