"""The 4-bit arithmetic against bitsandbytes, the paper's table, and hand arithmetic.

bitsandbytes' CPU backend is the independent source for bytes, scales and decoded values. Equal
means equal in every bit unless a docstring says otherwise.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.quantization import (
    QuantizationConfig,
    bits_per_weight,
    compute_advice,
    packed_bytes,
    resolve_compute_dtype,
)
from qlora_pl.modeling.base.reference_quantizer import (
    DoubleQuantized,
    ReferenceQuantized,
    dequantize_absmax,
    double_quantize,
    dynamic_codebook,
    fp4_codebook,
    nf4_codebook,
    pack_codes,
    quantize_4bit_reference,
    quantize_blockwise,
    unpack_codes,
)

QUANT_TYPES = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODEBOOKS = {"nf4": nf4_codebook, "fp4": fp4_codebook}

# QLoRA (arXiv:2305.14314), appendix E.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    different = ours.reshape(-1).view(torch.uint8) != theirs.reshape(-1).view(torch.uint8)
    assert not different.any(), f"{different.sum()} of {different.numel()} bytes differ"


def quantize_with_bitsandbytes(weight: Tensor, quant_type: str, double_quant: bool):
    return bnb.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
    )


def dequantize_with_bitsandbytes(packed: Tensor, state) -> Tensor:
    # An odd last dimension goes through torch.compile there: 20 s for the same numbers.
    with torch.compiler.set_stance("force_eager"):
        return bnb.dequantize_4bit(packed, state)


def assert_equals_bitsandbytes(weight: Tensor, quant_type: str, double_quant: bool) -> None:
    ours = quantize_4bit_reference(weight, quant_type, double_quant)
    packed, state = quantize_with_bitsandbytes(weight, quant_type, double_quant)
    assert_same_bits(ours.packed, packed.flatten())
    assert_same_statistics(ours, state)
    # Values, not bits: bitsandbytes' CPU kernels disagree on the sign of zero in FP4. And flat: a
    # vector comes back as one row from bitsandbytes.
    decoded, expected = ours.dequantize(), dequantize_with_bitsandbytes(packed, state)
    assert decoded.shape == weight.shape
    assert decoded.dtype == expected.dtype == weight.dtype
    assert torch.equal(decoded.flatten(), expected.flatten())
    if quant_type == "nf4":
        assert_same_bits(decoded.flatten(), expected.flatten())


def assert_same_statistics(ours: ReferenceQuantized, state) -> None:
    if not isinstance(ours.absmax, DoubleQuantized):
        assert_same_bits(ours.absmax, state.absmax)
        return
    assert_same_bits(ours.absmax.codes, state.absmax)
    assert_same_bits(ours.absmax.absmax, state.state2.absmax)
    assert_same_bits(ours.absmax.offset, state.offset)


def random_weight(shape: tuple[int, ...], kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    return {
        "normal": 0.02 * normal,
        "uniform": torch.rand(shape, generator=generator) - 0.5,
        "heavy_tailed": normal**5,  # a few outliers set the scale, most values fall near zero
        "negative": -normal.abs() - 0.1,
        "tiny": 1e-5 * normal,  # subnormal in float16
    }[kind]


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_4bit_codebook_equals_bitsandbytes_bit_for_bit(quant_type):
    """Source: bitsandbytes.functional.get_4bit_type."""
    assert_same_bits(CODEBOOKS[quant_type](), bnb.get_4bit_type(quant_type, device="cpu"))


def test_dynamic_codebook_equals_bitsandbytes_bit_for_bit():
    """Source: bitsandbytes.functional.create_dynamic_map."""
    assert_same_bits(dynamic_codebook(), bnb.create_dynamic_map())


def test_nf4_codebook_equals_the_published_table():
    """Source: QLoRA, appendix E, as printed."""
    # 1.2e-7: one float32 ulp at 1
    torch.testing.assert_close(nf4_codebook(), torch.tensor(PUBLISHED_NF4), rtol=0, atol=1.2e-7)


def test_nf4_has_an_exact_zero_eight_positive_and_seven_negative_values():
    """Source: QLoRA, section 3: 2**(k-1) + 1 positive and 2**(k-1) negative, zero shared."""
    codebook = nf4_codebook()
    counts = [(codebook == 0).sum(), (codebook > 0).sum(), (codebook < 0).sum()]
    assert counts == [1, 8, 7]


def test_fp4_is_e2m1_but_for_its_subnormal():
    """Source: the OCP E2M1 magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; only 0.5 is another number."""
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    ours = fp4_codebook()[:8].sort().values
    assert (ours != e2m1).nonzero().flatten().tolist() == [1]
    assert ours[1] == pytest.approx(0.0625 / 12)


# --- bitsandbytes, bit for bit --------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy_tailed", "negative", "tiny"])
def test_bytes_statistics_and_values_equal_bitsandbytes(kind, dtype, quant_type, double_quant):
    """Source: bitsandbytes' CPU backend; 576 blocks, so that double quantisation has three."""
    weight = random_weight((192, 192), kind).to(dtype)
    assert_equals_bitsandbytes(weight, quant_type, double_quant)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (64,), (65,), (130,), (3, 5), (5, 100), (3, 63), (129, 64), (2, 3, 64)]
)
def test_any_shape_equals_bitsandbytes(shape, quant_type, double_quant):
    """Source: bitsandbytes' CPU backend; odd counts, short last blocks, blocks that span rows."""
    assert_equals_bitsandbytes(random_weight(shape, "normal"), quant_type, double_quant)


@pytest.mark.parametrize("num_columns", [16, 32, 96, 160])
def test_blocks_span_rows_as_in_the_flattened_weight(num_columns):
    """Source: bitsandbytes on the same numbers as one vector.

    Not on the matrix itself: its AVX-512 kernel (0.50.2) then takes the scale of a neighbouring
    block wherever a row is a multiple of 16 but not of 64 long.
    """
    weight = random_weight((24, num_columns), "normal")
    packed, state = quantize_with_bitsandbytes(weight.flatten(), "nf4", False)
    expected = dequantize_with_bitsandbytes(packed, state).view(weight.shape)
    assert_same_bits(quantize_4bit_reference(weight, "nf4", False).dequantize(), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-40])
def test_blocks_of_one_value_equal_bitsandbytes(value, quant_type, double_quant):
    """Source: bitsandbytes' CPU backend; zeros and subnormals have no reciprocal to scale by."""
    alone = torch.full((64,), value)
    among_others = random_weight((4, 64), "normal").index_fill(0, torch.tensor(1), value)
    short_last_block = torch.cat([torch.ones(64), torch.full((10,), value)])
    for weight in (alone, among_others, short_last_block):
        assert_equals_bitsandbytes(weight, quant_type, double_quant)


@pytest.mark.parametrize("length", [64, 50])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_values_on_a_decision_threshold_equal_bitsandbytes(quant_type, length):
    """Source: bitsandbytes' CPU backend; every midpoint and its neighbours, at 200 scales.

    A block of 50 is a short last block, which is divided by its scale: a full one is multiplied by
    the reciprocal, and ends on the other side of some thresholds.
    """
    codes = CODEBOOKS[quant_type]().sort().values
    midpoints = (codes[:-1] + codes[1:]) / 2
    infinity = torch.tensor(torch.inf)
    near = [midpoints.nextafter(-infinity), midpoints, midpoints.nextafter(infinity)]
    block = torch.cat([*near, torch.ones(length - 45)])
    for scale in torch.linspace(0.5, 2, 200):
        weight = scale * block
        ours = quantize_4bit_reference(weight, quant_type, False)
        packed, _ = quantize_with_bitsandbytes(weight, quant_type, False)
        assert_same_bits(ours.packed, packed.flatten())


def test_random_scales_equal_bitsandbytes():
    """Source: bitsandbytes' CPU backend; 400,000 scales, of which 410 show its grid."""
    assert_scales_equal_bitsandbytes(
        torch.rand(400_000, generator=torch.Generator().manual_seed(0))
    )


def test_scales_on_a_decision_threshold_equal_bitsandbytes():
    """Source: bitsandbytes' CPU backend; points halfway between the grid points that matter."""
    codes = dynamic_codebook().double()
    grid_index = ((codes[:-1] + codes[1:]) / 2 + 1) * 32767.5
    thresholds = torch.cat([(grid_index.floor() + 0.5) / 32767.5 - 1, torch.ones(1)])
    blocks = torch.linspace(0.5, 2, 200)[:, None] * thresholds.float()  # (200, 256)
    # Each block with its mirror image: the mean that double quantisation subtracts is then zero.
    assert_scales_equal_bitsandbytes(torch.cat([blocks, -blocks]).flatten())


def assert_scales_equal_bitsandbytes(absmax: Tensor) -> None:
    ours = double_quantize(absmax)
    codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert_same_bits(ours.codes, codes)
    assert_same_bits(ours.absmax, state.absmax)
    assert_same_bits(dequantize_absmax(ours), bnb.dequantize_blockwise(codes, state) + ours.offset)


# --- what follows from the definition -------------------------------------------------------------


def test_first_element_sits_in_the_high_nibble():
    """Source: hand arithmetic."""
    codes = torch.tensor([[1, 2, 15]], dtype=torch.uint8)
    packed = pack_codes(codes, filler=7)
    assert packed.tolist() == [0x12, 0xF7]
    assert torch.equal(unpack_codes(packed, codes.shape), codes)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_error_stays_below_half_the_widest_gap_times_the_scale(quant_type):
    """Source: rounding to the nearest of 16 values errs by at most half a gap of the codebook."""
    weight = random_weight((64, 64), "heavy_tailed")
    error = (quantize_4bit_reference(weight, quant_type, False).dequantize() - weight).abs()
    half_gap = CODEBOOKS[quant_type]().sort().values.diff().max() / 2
    absmax = weight.abs().amax(dim=1, keepdim=True)  # one block per row
    assert (error <= absmax * half_gap * (1 + 1e-6)).all()  # 1e-6: a few float32 ulps


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_code_decodes_to_itself(quant_type):
    """Source: the codebook is a fixed point of rounding to it."""
    codebook = CODEBOOKS[quant_type]()
    codes, absmax = quantize_blockwise(codebook.repeat(4), codebook)
    assert absmax.tolist() == [1.0]
    assert torch.equal(codebook[codes.long()], codebook.repeat(4))


def test_nf4_errs_less_than_fp4_on_normal_weights():
    """Source: QLoRA, section 3: NF4 is made for normally distributed weights."""
    weight = random_weight((256, 256), "normal")
    error = {
        quant_type: (quantize_4bit_reference(weight, quant_type, True).dequantize() - weight).norm()
        for quant_type in QUANT_TYPES
    }
    assert error["nf4"] < 0.8 * error["fp4"]


def test_double_quantisation_hardly_moves_the_weights():
    """Source: QLoRA, section 3: "without degrading performance"; NF4 itself errs by 9 %."""
    weight = random_weight((256, 256), "normal")
    single = quantize_4bit_reference(weight, "nf4", False).dequantize()
    double = quantize_4bit_reference(weight, "nf4", True).dequantize()
    assert (double - single).norm() < 0.01 * weight.norm()


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bits_per_weight_are_the_papers(quant_type, double_quant, bits):
    """Source: QLoRA, section 3: 0.5 bit for the scales, 0.127 with double quantisation."""
    config = QuantizationConfig(quant_type=quant_type, double_quant=double_quant)
    assert bits_per_weight(config) == pytest.approx(bits, abs=5e-4)  # printed with 3 decimals


def test_double_quantisation_saves_three_gigabytes_of_65_billion_weights():
    """Source: QLoRA, section 3: "approximately 3 GB for a 65B model"."""
    num_weights = 65 * 10**9
    single = packed_bytes(num_weights, QuantizationConfig(double_quant=False))
    double = packed_bytes(num_weights, QuantizationConfig(double_quant=True))
    assert (single - double) / 1e9 == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_bytes_are_the_bytes_of_bitsandbytes_tensors(double_quant):
    """Source: the sizes of the tensors that bitsandbytes returns; full blocks on both levels."""
    weight = random_weight((256, 256), "normal")
    packed, state = quantize_with_bitsandbytes(weight, "nf4", double_quant)
    tensors = [packed, state.absmax, *([state.state2.absmax] if double_quant else [])]
    expected = sum(tensor.nbytes for tensor in tensors)
    assert packed_bytes(weight.numel(), QuantizationConfig(double_quant=double_quant)) == expected


# --- configuration --------------------------------------------------------------------------------


def test_named_compute_dtype_is_taken_as_named():
    """Source: the names of torch's dtypes."""
    device = torch.device("cpu")
    assert resolve_compute_dtype("float32", device) is torch.float32
    assert resolve_compute_dtype("bfloat16", device) is torch.bfloat16
    assert resolve_compute_dtype("float16", device) is torch.float16


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"),
    [
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_auto_on_cpu_is_bfloat16_only_where_it_is_native(monkeypatch, avx512_bf16, amx, expected):
    """Source: the rule in QuantizationConfig.compute_dtype."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_compute_dtype("auto", torch.device("cpu")) is expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_cuda_does_not_count_emulated_bfloat16(monkeypatch, native, expected):
    """Source: torch.cuda.is_bf16_supported, which says yes to emulation unless told otherwise."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert resolve_compute_dtype("auto", torch.device("cuda")) is expected


@pytest.mark.parametrize(
    ("name", "native", "words"),
    [
        ("auto", False, "auto is float16, with a loss scaler"),
        ("bfloat16", False, "only emulates bfloat16"),
        ("float16", True, "has bfloat16, which needs no loss scaler"),
        ("auto", True, None),
        ("float32", False, None),
    ],
)
def test_a_choice_on_cuda_is_honoured_with_advice(monkeypatch, name, native, words):
    """Source: the rule in QuantizationConfig.compute_dtype."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    advice = compute_advice(name, torch.device("cuda"))
    assert advice is None if words is None else words in advice


def test_float16_on_a_cpu_is_labelled():
    assert "slow" in compute_advice("float16", torch.device("cpu"))
    assert compute_advice("auto", torch.device("cpu")) is None


def test_auto_on_another_device_is_float32():
    """Source: the rule in QuantizationConfig.compute_dtype."""
    assert resolve_compute_dtype("auto", torch.device("meta")) is torch.float32


def test_default_config_is_the_papers():
    """Source: QLoRA, section 3: NF4 with double quantisation."""
    config = QuantizationConfig()
    assert config.is_quantized
    assert (config.quant_type, config.uses_double_quant) == ("nf4", True)


def test_unquantised_base_keeps_the_defaults():
    """A run may switch quantisation off by one key."""
    assert not QuantizationConfig(quant_type="none").is_quantized


def test_settings_without_effect_are_reported_together():
    """Source: the house rule that several problems in one config make one error."""
    with pytest.raises(ConfigurationError) as error:
        QuantizationConfig(quant_type="none", skip_modules=("o_proj",), storage_dtype="bfloat16")
    keys = [problem.split(":")[0] for problem in error.value.problems]
    assert keys == ["model.quantization.skip_modules", "model.quantization.storage_dtype"]
