"""Whether matrix products come out right, forward and backward, in each type on each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from qlora_pl.doctor.devices.torch_devices import training_devices
from qlora_pl.doctor.finding import Finding, Status, first_line
from qlora_pl.modeling.base.quantization import compute_advice, resolve_compute_dtype

ROWS, INPUTS, OUTPUTS = 64, 512, 256
BOUNDS = {
    torch.float32: 2.0**-16,
    torch.bfloat16: 2.0**-6,
    torch.float16: 2.0**-9,
}
"""Largest error of a product over its size (Frobenius), inputs being rounded already. 16 bits: four
roundings of the result (2**-8 and 2**-11 each), because a kernel may sum in four parts of its own
type; a wrong kernel is off by tens of percent. float32: 512 terms, summed in any order, stay below
512 x 2**-24 by far; TF32, with 2**-11, does not pass."""

IN_OTHER_TYPE = "qlora-pl fit --model.quantization.compute_dtype {} ..."

Product = Callable[[torch.device], tuple[float, float]]
"""Multiplies on a device; the error of the result and that of the input's gradient."""


def random_tensors(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``(ROWS, INPUTS)``, a weight ``(OUTPUTS, INPUTS)`` and a gradient of the outputs.

    float32, drawn on the CPU, so that each device gets the same.
    """
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, INPUTS, generator=draw)
    weight = torch.randn(OUTPUTS, INPUTS, generator=draw) * INPUTS**-0.5
    gradient = torch.randn(ROWS, OUTPUTS, generator=draw)
    return inputs.to(device), weight.to(device), gradient.to(device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The size of the difference over that of what is expected; not a number if either holds one.

    Compared on the CPU in float64, which no kernel at test has touched.
    """
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def plain_product(dtype: torch.dtype) -> Product:
    """A linear layer in one type, against the same numbers in float64 on the CPU."""

    def multiply(device: torch.device) -> tuple[float, float]:
        inputs, weight, gradient = (t.to(dtype) for t in random_tensors(device))
        inputs.requires_grad_()
        output = functional.linear(inputs, weight)
        output.backward(gradient)
        assert inputs.grad is not None
        exact_weight = weight.cpu().double()
        return (
            relative_error(output, inputs.detach().cpu().double() @ exact_weight.T),
            relative_error(inputs.grad, gradient.cpu().double() @ exact_weight),
        )

    return multiply


def tried(
    title: str, product: Product, bound: float, is_vital: bool, unusable: str, fix: str
) -> Iterator[Finding | str]:
    """Multiply on every device; equal devices share a line.

    Args:
        title: Of the type.
        product: What is tried.
        bound: Largest error that is right.
        is_vital: Whether ordinary runs need it on the device that they take.
        unusable: What follows where it does not work.
        fix: The command that mends it, or does without it.
    """
    works: dict[str, list[str]] = {}
    errors: dict[str, float] = {}
    for place, device in enumerate(training_devices()):
        yield str(device)
        kind = kind_of(device)
        try:
            forward, backward = product(device)
            worst = max(forward, backward)
            is_right = forward <= bound and backward <= bound  # neither holds for not a number
            problem = "" if is_right else f"{device}: off by {worst:.2g}, {bound:.2g} is allowed"
        except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
            problem = f"{device}: {first_line(error)}"
            worst = 0.0
        if problem:
            # the first device is the one that a run takes
            status = Status.BROKEN if is_vital and place == 0 else Status.WARNING
            yield Finding(title=title, status=status, found=problem, meaning=unusable, fix=fix)
        else:
            works.setdefault(kind, []).append(str(device))
            errors[kind] = max(worst, errors.get(kind, 0.0))
    for kind, names in works.items():
        count = f"{len(names)} x " if len(names) > 1 else ""
        yield Finding(
            title=title,
            status=Status.OK,
            found=f"right on {count}{kind}, forward and backward",
            meaning=f"off by {errors[kind]:.1g} from float64, {bound:.1g} is allowed",
        )


def kind_of(device: torch.device) -> str:
    """A device by its make; several of one make are alike."""
    return "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def auto() -> Iterator[Finding]:
    """What ``model.quantization.compute_dtype: auto`` comes to on the device that a run takes."""
    device = training_devices()[0]
    dtype = str(resolve_compute_dtype("auto", device)).removeprefix("torch.")
    advice = compute_advice("auto", device)
    meaning = {
        "bfloat16": "the paper's type: no loss scaler, no overflow",
        "float16": "the device lacks bfloat16; a loss scaler guards against overflow",
        "float32": "the device lacks bfloat16; exact, and slower",
    }
    yield Finding(
        title="compute dtype",
        status=Status.OK,
        found=f"auto is {dtype} on {device.type}",
        meaning=advice.rpartition(": ")[2].rstrip(".") if advice else meaning[dtype],
    )


def float32() -> Iterator[Finding | str]:
    """The type of trained weights, losses and gradients."""
    wrong = "losses and gradients are not what they should be; nothing that is trained can be used"
    fix = "unset NVIDIA_TF32_OVERRIDE TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
    product = plain_product(torch.float32)
    yield from tried("float32", product, BOUNDS[torch.float32], True, wrong, fix)


def bfloat16() -> Iterator[Finding | str]:
    """The paper's type of products."""
    needed = resolve_compute_dtype("auto", training_devices()[0]) is torch.bfloat16
    wrong = "losses and gradients of runs that compute in it are not what they should be"
    product = plain_product(torch.bfloat16)
    yield from tried(
        "bfloat16", product, BOUNDS[torch.bfloat16], needed, wrong, IN_OTHER_TYPE.format("float32")
    )


def float16() -> Iterator[Finding | str]:
    """The type of products on GPUs without bfloat16."""
    needed = resolve_compute_dtype("auto", training_devices()[0]) is torch.float16
    wrong = "losses and gradients of runs that compute in it are not what they should be"
    other = "float32" if needed else "auto"
    product = plain_product(torch.float16)
    yield from tried(
        "float16", product, BOUNDS[torch.float16], needed, wrong, IN_OTHER_TYPE.format(other)
    )
