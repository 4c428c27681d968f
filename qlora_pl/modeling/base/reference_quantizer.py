"""A 4-bit quantiser in plain torch: the readable second opinion on bitsandbytes' kernels.

In: a weight. Out: packed codes and their scales, and the weight they decode to; bit for bit what
bitsandbytes makes of it on a CPU, which the tests hold. It therefore imports nothing of it and
computes every table from its definition: a shared table would agree with a wrong one too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlora_pl.modeling.base.quantization import ABSMAX_BLOCK_SIZE, BLOCK_SIZE

QuantType = Literal["nf4", "fp4"]

_NF4_OFFSET = 0.9677083
_SMALLEST_DIVISOR = 1e-38  # bitsandbytes' stand-in for the scale of an all-zero block
_GRID_STEPS = 65535  # bitsandbytes' CPU kernel finds 8-bit codes on a grid of 2**16 points


def nf4_codebook() -> Tensor:
    """Return NF4's 16 values, ascending: equally likely quantiles of a normal distribution.

    QLoRA (arXiv:2305.14314), section 3 and appendix E: 8 positive values, 7 negative ones and an
    exact zero, scaled to [-1, 1]. Equation (4) alone does not give the table: its outermost
    quantiles are infinite.

    Returns:
        ``(16,)``, float32; code i stands for element i.
    """
    positive = _normal_quantiles(8)
    values = torch.cat([-_normal_quantiles(7), positive.new_zeros(1), positive.flip(0)])
    return values / values.max()  # in float32: dividing in float64 moves 6 of the 16 by an ulp


def _normal_quantiles(count: int) -> Tensor:
    """Return ``count`` normal quantiles from the outermost one down to zero, zero left out."""
    # The outermost probability lies half an interval from 1, averaged over the two halves of the
    # code: 1 - (1/32 + 1/30) / 2. The rounding to seven digits, and float32 positions, are part of
    # the definition: with the exact number 12 of the 16 values are an ulp off.
    positions = torch.linspace(_NF4_OFFSET, 0.5, count + 1, dtype=torch.float32)[:-1]
    return torch.special.ndtri(positions.double()).float()  # ndtri in float32 is off in 10 of 16


def fp4_codebook() -> Tensor:
    """Return bitsandbytes' FP4 in code order: one sign bit, two of exponent, one of mantissa.

    Not IEEE's E2M1 in two respects. The exponent field counts down (1, 2, 3 stand for 8, 4, 2), so
    the codes do not ascend. And the subnormal is 2**-4 where IEEE has 1, half the smallest normal:
    nothing lies between 1/192 and 1/6 of the scale.

    Returns:
        ``(16,)``, float32; code i stands for element i.
    """
    magnitudes = [0.0, 2.0**-4]
    for exponent_field in (1, 2, 3):
        for mantissa in (0, 1):
            magnitudes.append((1 + mantissa / 2) * 2.0 ** (4 - exponent_field))
    # 0.0 - m, not -m: code 8 is a second +0 in bitsandbytes' table.
    values = torch.tensor(magnitudes + [0.0 - m for m in magnitudes], dtype=torch.float32)
    return values / values.max()


def dynamic_codebook() -> Tensor:
    """Return the signed 8-bit dynamic map that holds the scales under double quantisation.

    Dettmers 2015 (arXiv:1511.04561) and "8-bit Optimizers via Block-wise Quantization"
    (arXiv:2110.02861): the bits before an indicator bit count decades, those after it
    divide the decade evenly. A decade that has f bits left holds the midpoints of 2**f equal parts
    of [0.1, 1]. It is not the FP8 (E4M3 or E5M2) that the QLoRA paper's wording suggests.

    Returns:
        ``(256,)``, float32, ascending: 127 values of either sign, zero and 1.
    """
    magnitudes = []
    for fraction_bits in range(7):
        edges = torch.linspace(0.1, 1, 2**fraction_bits + 1, dtype=torch.float32)
        magnitudes.append(10.0 ** (fraction_bits - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(magnitudes)
    zero, one = positive.new_zeros(1), positive.new_ones(1)
    return torch.cat([-positive.flip(0), zero, positive, one])


def quantize_blockwise(
    weight: Tensor, codebook: Tensor, block_size: int = BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    """Scale each block to [-1, 1] and store the index of the nearest code.

    Equation (1) of QLoRA (arXiv:2305.14314) with a table in place of the rounding. A value midway
    between two codes takes the lower one.

    Args:
        weight: Any shape and float dtype; read in row-major order, so a block may span rows.
        codebook: ``(16,)``, in code order.
        block_size: Weights that share one scale; the last block may be shorter.

    Returns:
        ``codes``, uint8, shape of ``weight``; ``absmax``, float32, ``(num_blocks,)``.
    """
    blocks = _split_into_blocks(weight.float(), block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp_min(_SMALLEST_DIVISOR))[:, None]
    if weight.numel() % block_size:
        # bitsandbytes on CPU divides a short last block, and keeps the stand-in as its scale.
        absmax[-1].clamp_(min=_SMALLEST_DIVISOR)
        scaled[-1] = blocks[-1] / absmax[-1]

    # For NF4 these midpoints are, in float32, the thresholds in bitsandbytes' Triton kernel too. In
    # FP4 that kernel compares |x| with shortened decimals (0.583333): 5 of 7 differ in the
    # seventh digit, ties go towards zero, and values near zero take code 8 if negative, else 0
    # (here: 8 if positive, else 0; both decode to zero).
    ascending, code_of_rank = codebook.sort(stable=True)
    ranks = torch.bucketize(scaled, (ascending[:-1] + ascending[1:]) / 2)
    codes = code_of_rank[ranks].to(torch.uint8)
    return codes.flatten()[: weight.numel()].view(weight.shape), absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Look the codes up and multiply by their block's scale, in float32, then round once.

    Args:
        codes: uint8, any shape.
        absmax: float32, ``(num_blocks,)``.
        codebook: ``(16,)`` or ``(256,)``, in code order.
        block_size: Codes that share one scale.
        dtype: Dtype of the result.

    Returns:
        The decoded values, shape of ``codes``.
    """
    scales = absmax.repeat_interleave(block_size)[: codes.numel()].view(codes.shape)
    return (codebook[codes.long()] * scales).to(dtype)


def pack_codes(codes: Tensor, filler: int = 0) -> Tensor:
    """Put two 4-bit codes into each byte, the first one in the high nibble.

    Args:
        codes: uint8, values 0..15, any shape.
        filler: Code for the nibble that an odd count leaves free.

    Returns:
        uint8, ``(ceil(codes.numel() / 2),)``.
    """
    flat = codes.flatten()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_tensor([filler])])
    return (flat[0::2] << 4) | flat[1::2]


def unpack_codes(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the codes of ``pack_codes`` in their ``shape``; an odd count's filler is dropped."""
    flat = torch.stack([packed >> 4, packed & 0xF], dim=1).flatten()
    return flat[: shape.numel()].view(shape)


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """The scales of one weight in 8 bits.

    Attributes:
        codes: uint8, ``(num_blocks,)``, into ``dynamic_codebook()``.
        absmax: float32, ``(ceil(num_blocks / 256),)``, the second-level scales.
        offset: float32 scalar, the mean of the scales: they are positive, the map is signed.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor


def double_quantize(absmax: Tensor) -> DoubleQuantized:
    """Quantise the scales to 8 bits around their mean, in blocks of 256.

    QLoRA (arXiv:2305.14314), section 3, "Double Quantization". The nearest code is found as
    bitsandbytes' CPU kernel does it, for the scaled value rounded to one of 65,536 grid points. On
    normal weights that moves 0.2 % of the codes, by one or two, and leaves 7 around zero unused.

    Args:
        absmax: float32, ``(num_blocks,)``.
    """
    offset = absmax.mean()
    blocks = _split_into_blocks(absmax - offset, ABSMAX_BLOCK_SIZE)
    second_absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / second_absmax)[:, None]).clamp(-1, 1)
    scaled = scaled.nan_to_num(nan=-1.0)  # zeros in a block of zeros (0 * inf) take code 0
    grid_index = ((scaled + 1) * (_GRID_STEPS / 2) + 0.5).long()

    grid = torch.arange(_GRID_STEPS + 1, dtype=torch.float32) / (_GRID_STEPS / 2) - 1
    codebook = dynamic_codebook()
    nearest = torch.bucketize(grid, (codebook[:-1] + codebook[1:]) / 2).to(torch.uint8)
    codes = nearest.to(absmax.device)[grid_index].flatten()[: absmax.numel()]
    return DoubleQuantized(codes, second_absmax, offset)


def dequantize_absmax(quantized: DoubleQuantized) -> Tensor:
    """Return the scales that ``double_quantize`` stored, float32, ``(num_blocks,)``."""
    codebook = dynamic_codebook().to(quantized.codes.device)
    centred = dequantize_blockwise(
        quantized.codes, quantized.absmax, codebook, ABSMAX_BLOCK_SIZE, torch.float32
    )
    return centred + quantized.offset


@dataclass(frozen=True, eq=False)
class ReferenceQuantized:
    """One weight in four bits, as bitsandbytes stores it.

    Attributes:
        packed: uint8, ``(ceil(num_weights / 2),)``.
        absmax: The scales, float32 ``(num_blocks,)``, or the same in 8 bits.
        quant_type: Which codebook the codes index.
        shape: Shape of the weight.
        dtype: Dtype of the weight, and of what it decodes to.
    """

    packed: Tensor
    absmax: Tensor | DoubleQuantized
    quant_type: QuantType
    shape: torch.Size
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, in its shape and dtype.

        bitsandbytes 0.50's AVX-512 kernel decodes otherwise, and wrongly, where the last dimension
        is a multiple of 16 but not of 64: it counts the blocks of every row from the row's start.
        """
        absmax = self.absmax
        if isinstance(absmax, DoubleQuantized):
            absmax = dequantize_absmax(absmax)
        codebook = _codebook(self.quant_type).to(self.packed.device)
        codes = unpack_codes(self.packed, self.shape)
        return dequantize_blockwise(codes, absmax, codebook, BLOCK_SIZE, self.dtype)


@torch.no_grad()
def quantize_4bit_reference(
    weight: Tensor, quant_type: QuantType, double_quant: bool
) -> ReferenceQuantized:
    """Quantise ``weight`` in blocks of 64, as ``bitsandbytes.functional.quantize_4bit`` does."""
    codebook = _codebook(quant_type).to(weight.device)
    codes, absmax = quantize_blockwise(weight, codebook)
    code_of_zero = 7 if quant_type == "nf4" else 0
    return ReferenceQuantized(
        packed=pack_codes(codes, filler=code_of_zero),
        absmax=double_quantize(absmax) if double_quant else absmax,
        quant_type=quant_type,
        shape=weight.shape,
        dtype=weight.dtype,
    )


def _codebook(quant_type: QuantType) -> Tensor:
    return nf4_codebook() if quant_type == "nf4" else fp4_codebook()


def _split_into_blocks(values: Tensor, block_size: int) -> Tensor:
    """Return ``values`` as ``(num_blocks, block_size)``, the last block filled up with zeros."""
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
