"""The ways to keep a matrix that are compared, what each makes of one, and what theory expects.

NF4, FP4 and int8 are what bitsandbytes' own kernels make; int4, which it has no kernel for, is the
readable quantiser's with 15 even steps. Double quantisation changes the scales and no code, so one
quantisation serves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qlora_pl.modeling.base.quantization import (
    ABSMAX_BLOCK_SIZE,
    BLOCK_SIZE,
    QuantizationConfig,
    bits_per_weight,
)
from qlora_pl.modeling.base.reference_quantizer import (
    dequantize_absmax,
    dequantize_blockwise,
    double_quantize,
    fp4_codebook,
    nf4_codebook,
    quantize_blockwise,
)

Kind = Literal["nf4", "fp4", "int4", "int8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""What ``model.quantization.block_size`` may be."""
INT8_STEPS = 127
ROWS = 1024
"""Of a matrix that plain torch works on at a time."""
_LARGEST_MAXIMUM = 9.0
"""In standard deviations; a normal weight beyond it has a probability of 2e-19."""
_GRID_POINTS = 8001


@dataclass(frozen=True, kw_only=True, order=True)
class Format:
    """One way to keep a matrix."""

    kind: Kind
    block_size: int | None = BLOCK_SIZE
    """Weights that share one scale; None: int8, whose rows have one each."""
    double_quant: bool = False

    @property
    def name(self) -> str:
        """As it is called in tables and in JSON: ``nf4 64 DQ``."""
        block = "" if self.block_size is None else f" {self.block_size}"
        return f"{self.kind}{block}{' DQ' if self.double_quant else ''}"

    @property
    def is_trainable(self) -> bool:
        """Whether a run can keep its base so."""
        return self.kind != "int4"

    def bits(self, inputs: int) -> float:
        """Of a weight, with its share of the scales.

        Args:
            inputs: Of the matrix, for int8's float32 scale a row.
        """
        if self.block_size is None:
            return 8 + 32 / inputs
        # A scale is a scale: the sum is the same for every 4-bit code.
        return bits_per_weight(
            QuantizationConfig(double_quant=self.double_quant, block_size=self.block_size)  # type: ignore[arg-type]
        )

    def settings(self) -> dict[str, Any]:
        """As keys of ``model.quantization``."""
        if self.block_size is None:
            return {"quant_type": self.kind}
        return {
            "quant_type": self.kind,
            "double_quant": self.double_quant,
            "block_size": self.block_size,
        }


def formats_of(
    kinds: Sequence[Kind], block_sizes: Sequence[int], double_quant: Sequence[bool]
) -> list[Format]:
    """Every combination that there is, in the order given."""
    found: list[Format] = []
    for kind in kinds:
        if kind == "int8":
            found.append(Format(kind=kind, block_size=None))
            continue
        for block in block_sizes:
            found += [Format(kind=kind, block_size=block, double_quant=d) for d in double_quant]
    return list(dict.fromkeys(found))


def int4_codebook() -> Tensor:
    """15 even steps from -1 to 1, float32: plain absmax rounding to -7..7.

    The "Int4" that QLoRA (arXiv:2305.14314, figure 3) compares NF4 with; the sixteenth code is left
    unused, as in every symmetric integer type.
    """
    return torch.arange(-7, 8, dtype=torch.float32) / 7


def decoded(matrix: Tensor, formats: Sequence[Format]) -> Iterator[tuple[Format, Tensor]]:
    """What a matrix decodes to after it was kept in each of these ways.

    Args:
        matrix: ``(out, in)`` float32, contiguous; rows are what a block may not span.
        formats: In any order; those of one code are worth giving together.

    Yields:
        Each format with its ``(out, in)`` float32, which is the receiver's to change.
    """
    for (kind, block_size), group in groupby(formats, lambda f: (f.kind, f.block_size)):
        wanted = list(group)
        if block_size is None:
            yield from ((format, _through_int8(matrix)) for format in wanted)
        elif kind == "int4":
            yield from _through_int4(matrix, wanted, block_size)
        else:
            yield from _through_bitsandbytes(matrix, wanted, block_size)


def _through_bitsandbytes(
    matrix: Tensor, formats: list[Format], block_size: int
) -> Iterator[tuple[Format, Tensor]]:
    import bitsandbytes.functional as bnb  # slow to import

    packed, state = bnb.quantize_4bit(matrix, blocksize=block_size, quant_type=formats[0].kind)
    scales = state.absmax
    for format in formats:
        if format.double_quant:
            # What quantize_4bit does with compress_statistics, after the same codes.
            offset = scales.mean()
            codes, second = bnb.quantize_blockwise(scales - offset, blocksize=ABSMAX_BLOCK_SIZE)
            state.absmax = bnb.dequantize_blockwise(codes, second) + offset
        else:
            state.absmax = scales
        yield format, bnb.dequantize_4bit(packed, state)


def _through_int4(
    matrix: Tensor, formats: list[Format], block_size: int
) -> Iterator[tuple[Format, Tensor]]:
    codebook = int4_codebook().to(matrix.device)
    # Some rows at a time, which hold whole blocks: plain torch takes 30 bytes a weight.
    pieces = [quantize_blockwise(rows, codebook, block_size) for rows in matrix.split(ROWS)]
    codes = [codes for codes, _ in pieces]
    scales = torch.cat([scales for _, scales in pieces])
    for format in formats:
        kept = dequantize_absmax(double_quantize(scales)) if format.double_quant else scales
        yield format, _looked_up(codes, kept, codebook, block_size)


def _looked_up(codes: list[Tensor], scales: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    """Some rows' codes at a time -> the whole matrix."""
    values = torch.empty(sum(map(len, codes)), codes[0].shape[1], device=scales.device)
    of_each = scales.split([some.numel() // block_size for some in codes])
    places = values.split([len(some) for some in codes])
    for some, its, place in zip(codes, of_each, places, strict=True):
        place.copy_(dequantize_blockwise(some, its, codebook, block_size, torch.float32))
    return values


def _through_int8(matrix: Tensor) -> Tensor:
    import bitsandbytes.functional as bnb  # slow to import

    codes, scales, _ = bnb.int8_vectorwise_quant(matrix.half())  # float16 is all that it takes
    return codes.float().mul_(scales.float()[:, None]).div_(INT8_STEPS)


# -- what theory expects ---------------------------------------------------------------------------


def normal_error(format: Format, inputs: int) -> float:
    """The relative RMS error of normal weights, by numeric integration.

    Given the largest magnitude m of a block of n, the other n - 1 weights are normal between -m and
    m, and each is replaced by the nearest of m times the codes; the largest itself is exact. Double
    quantisation, which adds little, is left out.

    Args:
        format: Whose.
        inputs: Of the matrix, whose rows are the blocks of int8.

    Returns:
        The root of the expected squared error over the weights' variance.
    """
    if format.block_size is None:
        return _normal_error("int8", inputs)
    return _normal_error(format.kind, format.block_size)


@lru_cache
def _normal_error(kind: Kind, block_size: int) -> float:
    codebook = _codebook(kind).double().unique()
    edges = torch.cat([codebook[:1], (codebook[:-1] + codebook[1:]) / 2, codebook[-1:]])
    largest = torch.linspace(0.01, _LARGEST_MAXIMUM, _GRID_POINTS, dtype=torch.float64)
    inside = 2 * _below(largest) - 1  # probability of a magnitude under the largest
    density = 2 * block_size * inside ** (block_size - 1) * _density(largest)

    low, high = largest[:, None] * edges[:-1], largest[:, None] * edges[1:]
    code = largest[:, None] * codebook
    mass = _below(high) - _below(low)
    first = _density(low) - _density(high)  # integral of x times the density
    second = mass + low * _density(low) - high * _density(high)
    squared = (second - 2 * code * first + code**2 * mass).sum(dim=1) / inside
    expected = torch.trapezoid(density * squared, largest) * (block_size - 1) / block_size
    return float(expected.sqrt())


def _codebook(kind: Kind) -> Tensor:
    if kind == "int8":
        return torch.arange(-INT8_STEPS, INT8_STEPS + 1, dtype=torch.float32) / INT8_STEPS
    tables = {"nf4": nf4_codebook, "fp4": fp4_codebook, "int4": int4_codebook}
    return tables[kind]()


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5


def _below(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)
