"""Which part of a step an operation goes to, in real profiles of work whose kind is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch.nn import functional

from qlora_pl.benching.parts import MICRO_BATCH, PARTS, Parts, class_of, time_by_part


def profiled(work: Callable[[], Any]) -> Parts:
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    return time_by_part(profiler.events() or [], seconds, 1, is_cuda=False)


A = torch.randn(512, 512)
LAYER = bnb.nn.Linear4bit(2048, 2048, bias=False, compute_dtype=torch.float32)
LAYER.to("cpu")
LOGITS = torch.randn(256, 8192, requires_grad=True)
LABELS = torch.randint(0, 8192, (256,))
HEADS = torch.randn(2, 8, 256, 64)


def of_products() -> None:
    for _ in range(10):
        A @ A


def of_decoding() -> None:
    with torch.no_grad():
        weight: Any = LAYER.weight
        for _ in range(3):
            bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def of_losses() -> None:
    functional.cross_entropy(LOGITS, LABELS).backward()


def of_attention() -> None:
    functional.scaled_dot_product_attention(HEADS, HEADS, HEADS, is_causal=True)


def of_elements() -> None:
    for _ in range(20):
        torch.sin(A)


@pytest.mark.parametrize(
    ("work", "part"),
    [
        (of_products, "GEMM"),
        (of_decoding, "dequantisation"),
        (of_losses, "loss"),
        (of_attention, "attention"),
        (of_elements, "element-wise"),
        (lambda: time.sleep(0.05), "idle"),
    ],
)
def test_work_of_one_kind_is_found_in_its_part(work: Callable[[], Any], part: str) -> None:
    found = profiled(work)
    assert set(found.seconds) == set(PARTS)
    assert sum(found.seconds.values()) == pytest.approx(found.step_seconds)
    others = {name: share for name, share in found.shares.items() if name not in (part, "idle")}
    assert found.shares[part] > max(others.values(), default=0)


def test_a_packed_layer_takes_both_decoding_and_a_product() -> None:
    rows = torch.randn(64, 2048, requires_grad=True)
    found = profiled(lambda: LAYER(rows).sum().backward())
    assert found.seconds["dequantisation"] > 0
    assert found.seconds["GEMM"] > 0


def test_forward_and_backward_within_the_optimizers_step_are_not_the_optimizers() -> None:
    """Lightning hands them to it as a closure."""
    weight = torch.nn.Parameter(torch.randn(512, 512))
    optimizer = torch.optim.AdamW([weight])

    def closure() -> Any:
        with torch.profiler.record_function(MICRO_BATCH):
            loss = (A @ weight @ A).sum()
            loss.backward()
        return loss

    found = profiled(lambda: optimizer.step(closure))
    assert found.seconds["GEMM"] > found.seconds["optimizer"] > 0


def test_what_a_loader_does_is_data() -> None:
    class Slow(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, number: int) -> Any:
            time.sleep(0.01)
            return torch.sin(A)

    loader = torch.utils.data.DataLoader(Slow(), batch_size=None)
    found = profiled(lambda: list(loader))
    assert found.shares["data"] > 0.8


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("c10d::allreduce_", "communication"),
        ("ncclDevKernel_AllReduce".lower(), "communication"),
        ("aten::_flash_attention_backward", "attention"),
        ("aten::addmm_", "GEMM"),
        ("bitsandbytes::dequantize_blockwise", "dequantisation"),
        ("aten::nll_loss_backward", "loss"),
        ("aten::mul", None),
        ("aten::empty", None),
    ],
)
def test_names_of_operations_are_known(name: str, part: str | None) -> None:
    assert class_of(name) == part
