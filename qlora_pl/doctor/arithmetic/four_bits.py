"""bitsandbytes: which library it has loaded, and whether its layers multiply right."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlora_pl.doctor.arithmetic.products import (
    BOUNDS,
    Product,
    random_tensors,
    relative_error,
    tried,
)
from qlora_pl.doctor.devices.torch_devices import built_for
from qlora_pl.doctor.finding import Finding, Status
from qlora_pl.modeling.base.quantization import resolve_compute_dtype
from qlora_pl.modeling.base.reference_quantizer import quantize_4bit_reference

INT8_BOUND = 0.03
"""LLM.int8 rounds the inputs too, to 127 steps of a row's largest: 3 standard deviations / 127 /
sqrt(12) are 0.7 %; four times that is allowed, as the largest of 512 varies."""
DECODED_BOUND = 2.0**-9
"""Besides the product's own: scales in 8 bits come out one code off in 0.2 % of the blocks between
bitsandbytes' CPU and GPU kernels."""

AS_NF4 = "qlora-pl fit --model.quantization.quant_type nf4 ..."


def bitsandbytes_library() -> Iterator[Finding]:
    """The native library that bitsandbytes has loaded, against what torch was built for."""
    library = type(bnb.cextension.lib).__name__
    name, version = loaded_library(), bnb.__version__
    if "ErrorHandler" in library:
        yield Finding(
            title="bitsandbytes",
            status=Status.BROKEN,
            found=f"{version}, and none of its native libraries loads (torch: {built_for()})",
            meaning="4 and 8 bits fail at the first layer, or run many times slower",
            fix="python -m bitsandbytes; pip install --force-reinstall --no-deps bitsandbytes",
        )
        return
    has_gpu = torch.cuda.is_available()
    is_built_for_it = not has_gpu or bool(bnb.cextension.lib.compiled_with_cuda)
    found = f"{version} with {name}" if name else version
    yield Finding(
        title="bitsandbytes",
        status=Status.OK if is_built_for_it else Status.BROKEN,
        found=f"{found} (torch: {built_for()})",
        meaning=_of_match(name)
        if is_built_for_it
        else "there is a GPU, and this library runs on CPUs alone: 4 bits fail on the GPU",
        fix="" if is_built_for_it else "unset BNB_CUDA_VERSION; python -m bitsandbytes",
    )


def loaded_library() -> str:
    """The file name of bitsandbytes' native library in this process; "" where it cannot be told."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return ""
    found = re.search(r"/(libbitsandbytes_\w+\.so)", maps)
    return found[1] if found else ""


def _of_match(name: str) -> str:
    number = re.search(r"cuda(\d+)", name)
    cuda = str(torch.version.cuda or "")
    if number and cuda and number[1] != cuda.replace(".", ""):
        return f"built for another CUDA of the same generation than torch's {cuda}, which is meant"
    return "its library for this machine is loaded"


def grad_of(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    """A layer's output, and the gradient of its inputs, None if there is none."""
    inputs = inputs.detach().requires_grad_()
    output = layer(inputs)
    if output.requires_grad:
        output.backward(gradient)
    return output.detach(), inputs.grad


def four_bit_layer(kind: Literal["nf4", "fp4"], weight: Tensor, dtype: torch.dtype) -> Any:
    """A weight in 4 bits with double quantisation, as a run loads it."""
    outputs, inputs = weight.shape
    layer: Any = bnb.nn.Linear4bit(inputs, outputs, False, dtype, True, kind)
    layer.weight = bnb.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type=kind, compress_statistics=True, module=layer
    )
    return layer.to(weight.device)


def four_bit_product(kind: Literal["nf4", "fp4"]) -> Product:
    """A 4-bit layer, against a plain quantiser's weights in float64 on the CPU."""

    def multiply(device: torch.device) -> tuple[float, float]:
        dtype = resolve_compute_dtype("auto", device)
        inputs, weight, gradient = random_tensors(device)
        layer = four_bit_layer(kind, weight, dtype)
        layer.support_avx512bf16_for_cpu = False  # as in a run: see gradients.py
        inputs, gradient = inputs.to(dtype), gradient.to(dtype)
        output, grad = grad_of(layer, inputs, gradient)
        assert grad is not None, "the input gets no gradient"
        exact = quantize_4bit_reference(weight.cpu(), kind, double_quant=True).dequantize()
        rounded = exact.to(dtype).double()  # bitsandbytes decodes into the products' type
        return (
            relative_error(output, inputs.cpu().double() @ rounded.T),
            relative_error(grad, gradient.cpu().double() @ rounded),
        )

    return multiply


def int8_product(device: torch.device) -> tuple[float, float]:
    """An LLM.int8 layer, against the weight rounded row by row, in float64 on the CPU."""
    inputs, weight, gradient = random_tensors(device)
    outputs, width = weight.shape
    layer: Any = bnb.nn.Linear8bitLt(width, outputs, False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(device)
    dtype = torch.float16 if device.type == "cuda" else resolve_compute_dtype("auto", device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that inputs pass through float16
        output, grad = grad_of(layer, inputs.to(dtype), gradient.to(dtype))
    assert grad is not None, "the input gets no gradient"
    scale = weight.cpu().double().abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight.cpu().double() / scale).round() * scale
    return (
        relative_error(output, inputs.cpu().double() @ rounded.T),
        relative_error(grad, gradient.cpu().double() @ rounded),
    )


def nf4() -> Iterator[Finding | str]:
    """The quantisation of this project's runs."""
    wrong = "no QLoRA run can be trusted here; qlora-pl fit would train on other weights"
    bound = max(BOUNDS[torch.bfloat16], BOUNDS[torch.float16]) + DECODED_BOUND
    fix = "pip install --force-reinstall --no-deps --constraint constraints.txt bitsandbytes"
    yield from tried("NF4", four_bit_product("nf4"), bound, True, wrong, fix)


def fp4() -> Iterator[Finding | str]:
    """The paper's other 4-bit type."""
    wrong = "model.quantization.quant_type: fp4 does not work there; nf4, the default, may"
    bound = max(BOUNDS[torch.bfloat16], BOUNDS[torch.float16]) + DECODED_BOUND
    yield from tried("FP4", four_bit_product("fp4"), bound, False, wrong, AS_NF4)


def int8() -> Iterator[Finding | str]:
    """LLM.int8."""
    wrong = "model.quantization.quant_type: int8 does not work there; nf4, the default, may"
    yield from tried("int8", int8_product, INT8_BOUND, False, wrong, AS_NF4)
