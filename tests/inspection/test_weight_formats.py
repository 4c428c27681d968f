"""What each way to keep a matrix makes of it, beside bitsandbytes' own calls and beside theory."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor

from qlora_pl.inspection.weights.formats import (
    Format,
    decoded,
    formats_of,
    int4_codebook,
    normal_error,
)
from qlora_pl.modeling.base.reference_quantizer import (
    dequantize_blockwise,
    dynamic_codebook,
    fp4_codebook,
    nf4_codebook,
    quantize_blockwise,
)

ALL = formats_of(["nf4", "fp4", "int4", "int8"], [64, 128], [True, False])
NORMAL = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))


def through(format: Format, matrix: Tensor = NORMAL) -> Tensor:
    ((found, kept),) = decoded(matrix, [format])
    assert found == format
    return kept


def relative_rms(format: Format, matrix: Tensor = NORMAL) -> float:
    return float((through(format, matrix) - matrix).norm() / matrix.norm())


def test_every_combination_is_there_once() -> None:
    assert len(ALL) == 3 * 2 * 2 + 1
    assert [f.name for f in ALL][:4] == ["nf4 64 DQ", "nf4 64", "nf4 128 DQ", "nf4 128"]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bits_are_what_bitsandbytes_makes_of_a_weight(
    kind: Any, block_size: int, double_quant: bool
) -> None:
    """One quantisation serves both kinds of scales; bit for bit the library's own two calls."""
    both = formats_of([kind], [block_size], [True, False])
    found = dict(decoded(NORMAL, both))
    packed, state = bnb.quantize_4bit(
        NORMAL, blocksize=block_size, compress_statistics=double_quant, quant_type=kind
    )
    expected = bnb.dequantize_4bit(packed, state)
    format = Format(kind=kind, block_size=block_size, double_quant=double_quant)
    assert torch.equal(found[format], expected)


@pytest.mark.parametrize(("kind", "codebook"), [("nf4", nf4_codebook), ("fp4", fp4_codebook)])
def test_four_bits_are_what_the_readable_quantiser_makes(kind: Any, codebook: Any) -> None:
    codes, scales = quantize_blockwise(NORMAL, codebook())
    expected = dequantize_blockwise(codes, scales, codebook(), 64, torch.float32)
    assert torch.equal(through(Format(kind=kind)), expected)


def test_int4_has_the_steps_of_bitsandbytes_linear_map() -> None:
    """Which it has for four bits, though no kernel reads it."""
    theirs = bnb.create_linear_map(signed=True, total_bits=4)
    distances = (theirs[:, None] - int4_codebook()).abs()
    assert distances.amin(dim=0).max() < 1e-6  # its zero is 6e-8
    assert distances.amin(dim=1).max() < 1e-6


def test_int4_is_rounding_to_fifteen_steps() -> None:
    blocks = NORMAL.view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    expected = (torch.round(blocks / scale * 7) / 7 * scale).view_as(NORMAL)
    # ties and last digits aside: a code more or less is a seventh of the scale
    assert torch.allclose(through(Format(kind="int4")), expected, rtol=0, atol=1e-5)


def test_int8_is_what_a_layer_of_bitsandbytes_holds() -> None:
    layer = Linear8bitLt(1024, 512, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(NORMAL, has_fp16_weights=False, requires_grad=False)
    held: Any = layer.to("cpu").weight
    assert held.data.dtype == torch.int8
    expected = held.data.float() * held.SCB.float()[:, None] / 127
    kept = through(Format(kind="int8", block_size=None))
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("block_size", [64, 256])
def test_int4_is_nearest_among_its_codes_in_float64(block_size: int) -> None:
    """Source: every code tried on every weight, in NumPy's float64.

    Each kept weight is as near as the nearest code to float32's rounding, of which scales that are
    read back, products and ties have a few steps; the error of all together is the same.
    """
    blocks = NORMAL.double().numpy().reshape(-1, block_size)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.arange(-7, 8) / 7
    nearest = np.full_like(blocks, np.inf)
    for code in codes:
        nearest = np.minimum(nearest, np.abs(blocks - scale * code))
    kept = through(Format(kind="int4", block_size=block_size)).double().numpy()
    distance = np.abs(kept.reshape(blocks.shape) - blocks)
    assert np.abs(distance - nearest).max() < 1e-6 * scale.max()
    assert (distance**2).sum() == pytest.approx((nearest**2).sum(), rel=1e-7)


def test_int8_is_rounding_to_127_steps_of_the_rows_largest_in_float64() -> None:
    """Source: NumPy's float64 on what is left of the weights in float16, which the kernel takes."""
    half = NORMAL.half().double().numpy()
    step = np.abs(half).max(axis=1, keepdims=True) / 127
    expected = np.round(half / step) * step
    kept = through(Format(kind="int8", block_size=None)).double().numpy()
    # A tie in float32 may fall the other way: a step more or less, as far from the weight.
    assert (np.abs(kept - expected) < 1e-6 * np.abs(half).max()).mean() > 0.999
    error = ((kept - NORMAL.double().numpy()) ** 2).sum()
    assert error == pytest.approx(((expected - NORMAL.double().numpy()) ** 2).sum(), rel=1e-5)


def test_double_quantisation_is_that_of_the_scales_in_float64() -> None:
    """Source: the dynamic map's nearest value for every scale less their mean, in NumPy's float64.

    The kernel finds it on a grid of 65,536 points, which moves few of them by one: the error of
    weights is the same to a thousandth.
    """
    scales = NORMAL.double().numpy().reshape(-1, 64)
    scales = np.abs(scales).max(axis=1)
    centred = (scales - scales.mean()).reshape(-1, 256)
    second = np.abs(centred).max(axis=1, keepdims=True)
    table = dynamic_codebook().double().numpy()
    codes = np.abs((centred / second)[..., None] - table).argmin(axis=-1)
    kept = (table[codes] * second).reshape(-1) + scales.mean()
    plain = through(Format(kind="nf4")).double().numpy().reshape(-1, 64)
    expected = plain * (kept / scales)[:, None]
    found = through(Format(kind="nf4", double_quant=True)).double().numpy().reshape(-1, 64)
    moved = ((expected - plain) ** 2).sum()
    assert ((found - plain) ** 2).sum() == pytest.approx(moved, rel=1e-2)
    whole = NORMAL.double().numpy().reshape(-1, 64)
    assert ((found - whole) ** 2).sum() == pytest.approx(((expected - whole) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("format", [f for f in ALL if not f.double_quant], ids=lambda f: f.name)
def test_normal_weights_have_the_error_that_theory_expects(format: Format) -> None:
    """524,288 normal weights through the real kernels beside the integral.

    A sum of so many squared errors is known to about 0.2 % (and its root to half of that); int8's
    float16 input adds as much again.
    """
    assert relative_rms(format) == pytest.approx(normal_error(format, 1024), rel=4e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_the_integral_agrees_with_a_sum_over_single_weights(kind: Any) -> None:
    """The same expectation by brute force in NumPy: a grid of weights under a grid of maxima."""
    codebook = {"nf4": nf4_codebook, "fp4": fp4_codebook, "int4": int4_codebook}[kind]()
    values = np.sort(codebook.double().numpy())
    n = 64
    maxima = np.linspace(0.8, 6.5, 400)
    inside = np.array([math.erf(m / math.sqrt(2)) for m in maxima])
    weight_of = inside ** (n - 1) * np.exp(-(maxima**2) / 2)
    weight_of /= weight_of.sum()
    total = 0.0
    for m, chance in zip(maxima, weight_of, strict=True):
        x = np.linspace(-m, m, 4001)
        density = np.exp(-(x**2) / 2)
        nearest = values[np.abs(x[:, None] / m - values[None]).argmin(axis=1)]
        total += chance * ((x - m * nearest) ** 2 * density).sum() / density.sum()
    expected = math.sqrt(total * (n - 1) / n)
    assert normal_error(Format(kind=kind), 1024) == pytest.approx(expected, rel=1e-3)  # the grid's


def test_larger_blocks_and_double_quantisation_cost_accuracy() -> None:
    errors = [relative_rms(Format(kind="nf4", block_size=size)) for size in (64, 128, 256, 512)]
    assert errors == sorted(errors)
    assert relative_rms(Format(kind="nf4")) < relative_rms(Format(kind="nf4", double_quant=True))


def test_bits_are_those_of_the_paper() -> None:
    """QLoRA, section 3: 4.5 bits, with double quantisation 4.127."""
    assert Format(kind="nf4").bits(4096) == 4.5
    assert Format(kind="nf4", double_quant=True).bits(4096) == pytest.approx(4.127, abs=5e-4)
    assert Format(kind="int8", block_size=None).bits(1024) == 8 + 32 / 1024
