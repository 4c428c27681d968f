"""NF4 on the GPU against the CPU's and against the quantiser in plain torch; products with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu.place import Findings, Place

SHAPES = [(1024, 1024), (2816, 1024), (64, 11008)]
MAX_CODES = 1e-5
"""Share of 4-bit codes that may differ: values midway between two codes, up to rounding."""
MAX_CONSTANTS = 0.01
"""Share of 8-bit constants that may differ; CPU kernels find them on a grid (0.2 % expected)."""


def codes_and_constants(place: Place, findings: Findings) -> None:
    """Quantise the same weights in three ways, then multiply."""
    for kind in ("normal", "heavy-tailed"):
        for shape in SHAPES:
            _compare(place, findings, kind, shape)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        _multiply(place, findings, dtype, bound)


def random_weight(kind: str, shape: tuple[int, int]) -> Tensor:
    """On the CPU, the same each time."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (normal**5 if kind == "heavy-tailed" else 0.02 * normal).to(torch.bfloat16)


def _quantize(weight: Tensor) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return packed.cpu().flatten(), state


def _differing(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Of two tensors of integers."""
    gaps = (ours.cpu().int() - theirs.cpu().int()).abs()
    return {"differ": int((gaps > 0).sum()), "of": gaps.numel(), "largest": int(gaps.max())}


def _compare(place: Place, findings: Findings, kind: str, shape: tuple[int, int]) -> None:
    from bitsandbytes.functional import dequantize_4bit

    from qlora_pl.modeling.base.reference_quantizer import quantize_4bit_reference, unpack_codes

    weight = random_weight(kind, shape)
    reference: Any = quantize_4bit_reference(weight, "nf4", True)
    sides = {"device": _quantize(weight.to(place.device)), "cpu": _quantize(weight)}
    codes = {name: unpack_codes(packed, weight.shape) for name, (packed, _) in sides.items()}
    codes["reference"] = unpack_codes(reference.packed, weight.shape)
    constants = {name: state.absmax for name, (_, state) in sides.items()}
    constants["reference"] = reference.absmax.codes
    name = f"{kind} {shape[0]} x {shape[1]}"
    for other in ("cpu", "reference"):
        found = _differing(codes["device"], codes[other])
        findings.claim(
            f"4-bit codes of {name} are those of the {other}, ties apart",
            found["differ"] <= MAX_CODES * found["of"] + 1 and found["largest"] <= 1,
            **found,
        )
        found = _differing(constants["device"], constants[other])
        findings.claim(
            f"8-bit constants of {name} are those of the {other}, neighbours apart",
            found["differ"] <= MAX_CONSTANTS * found["of"] + 1 and found["largest"] <= 2,
            **found,
        )
    # Decoded by the kernel, and by the plain quantiser from the very bytes and constants.
    packed, state = sides["device"]
    decoded = dequantize_4bit(packed.reshape(-1, 1).to(place.device), state).cpu()
    expected = _decode(packed, state, weight)
    gap = (decoded.float() - expected.float()).abs().max() / expected.float().abs().max()
    findings.claim(
        f"{name} decodes to what the plain quantiser reads in the same bytes",
        float(gap) <= 2**-7,  # the last bit of bfloat16
        relative_difference=float(gap),
        elements_that_differ=int((decoded != expected).sum()),
    )


def _decode(packed: Tensor, state: Any, weight: Tensor) -> Tensor:
    from qlora_pl.modeling.base.reference_quantizer import DoubleQuantized, ReferenceQuantized

    constants = DoubleQuantized(
        state.absmax.cpu(), state.state2.absmax.float().cpu(), state.offset.float().cpu()
    )
    return ReferenceQuantized(packed, constants, "nf4", weight.shape, weight.dtype).dequantize()


def _multiply(place: Place, findings: Findings, dtype: torch.dtype, bound: float) -> None:
    """A linear layer's outputs and gradients against float64 products with the decoded weight."""
    from bitsandbytes.nn import Linear4bit

    from qlora_pl.modeling.loading.base_loading import keep_gradients_on_cpu

    layer = Linear4bit(
        1024, 2816, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True
    )
    layer.weight.data.copy_(random_weight("normal", (2816, 1024)))
    layer = layer.to(place.device)
    keep_gradients_on_cpu(layer)
    packed = layer.weight.data.cpu().flatten()
    weight = _decode(packed, layer.weight.quant_state, torch.empty(2816, 1024, dtype=dtype))
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 128, 1024, generator=draw).to(dtype)
    direction = torch.randn(3, 128, 2816, generator=draw).to(dtype)

    given = inputs.clone().to(place.device).requires_grad_()
    output = layer(given)
    output.backward(direction.to(place.device))
    twin = inputs.double().requires_grad_()
    expected = torch.nn.functional.linear(twin, weight.double())
    expected.backward(direction.double())
    kind = str(dtype).removeprefix("torch.")
    assert given.grad is not None
    assert twin.grad is not None
    pairs = {"outputs": (output, expected), "gradients": (given.grad, twin.grad)}
    with torch.no_grad():  # one row takes another kernel where nothing is trained
        pairs["one row"] = (layer(given[:1, :1]), expected[:1, :1])
    for name, (ours, theirs) in pairs.items():
        gap = (ours.detach().double().cpu() - theirs.detach()).abs().max() / theirs.abs().max()
        findings.claim(
            f"{name} of a linear layer in {kind} are its twin's",
            float(gap) <= bound,
            relative_difference=float(gap),
            bound=bound,
        )
