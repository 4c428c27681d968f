"""Whether gradients are still there after an evaluation: the trap of CPUs with AVX512-BF16.

bitsandbytes repacks a 4-bit weight in place at its first forward without gradients, for a kernel
that has no backward. A run switches that off; here both are tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor, nn

from qlora_pl.doctor.arithmetic.four_bits import four_bit_layer, grad_of
from qlora_pl.doctor.arithmetic.products import random_tensors
from qlora_pl.doctor.finding import Finding, Status
from qlora_pl.modeling.loading.base_loading import keep_gradients_on_cpu

TITLE = "gradients after an evaluation"


def gradients_after_evaluation() -> Iterator[Finding | str]:
    """Train, evaluate and train a 4-bit layer again, as a run does with its guard and without."""
    if not has_avx512bf16():
        yield Finding(
            title=TITLE,
            status=Status.OK,
            found="bitsandbytes does not repack weights on this processor",
            meaning="the trap of AVX512-BF16 is not here",
        )
        return
    yield "a layer with the guard"
    before, after = around_an_evaluation(is_guarded=True)
    is_kept = before is not None and after is not None and torch.equal(before, after)
    yield "a layer without the guard"
    bare_before, bare_after = around_an_evaluation(is_guarded=False)
    is_lost = bare_before is not None and (
        bare_after is None or not torch.equal(bare_before, bare_after)
    )
    if not is_kept:
        state = "gone" if after is None else "others"
        yield Finding(
            title=TITLE,
            status=Status.BROKEN,
            found=f"they are {state}, in spite of this project's guard",
            meaning="after the first validation most adapters would stop learning, without a word",
            fix='pip install "bitsandbytes>=0.50,<0.51"',
        )
    elif is_lost:
        yield Finding(
            title=TITLE,
            status=Status.OK,
            found="bitsandbytes loses them here, and this project's guard keeps them, bit for bit",
            meaning="runs are safe; scripts of your own lose five in seven after an evaluation",
        )
    else:
        yield Finding(
            title=TITLE,
            status=Status.OK,
            found="there, bit for bit, even without this project's guard",
            meaning="this bitsandbytes repacks nothing that is trained",
        )


def around_an_evaluation(is_guarded: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of a 4-bit layer's inputs before and after a forward without gradients."""
    inputs, weight, gradient = (t.to(torch.bfloat16) for t in random_tensors(torch.device("cpu")))
    model = nn.Sequential(four_bit_layer("nf4", weight.float(), torch.bfloat16))
    if is_guarded:
        keep_gradients_on_cpu(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the kernel's own word on having no backward
        before = _trained(model, inputs, gradient)
        model.eval()
        with torch.no_grad():
            model(inputs)
        return before, _trained(model, inputs, gradient)


def _trained(model: Any, inputs: Tensor, gradient: Tensor) -> Tensor | None:
    model.train()
    return grad_of(model, inputs, gradient)[1]
