"""What the device does at best, measured in the same run: matrix products and decoding of 4 bits.

A share of what a data sheet promises says as much about the card's clock and cooling as about the
program; a share of what this card has just done says what the program leaves on the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from qlora_pl.benching.synthetic import pack
from qlora_pl.modeling.base.quantization import QuantizationConfig, bits_per_weight

SIDE = {"cuda": 8192, "cpu": 2048}
"""Of the square product: large enough for the best rate, 0.1 s at most."""
LEAST_SECONDS = 0.2
"""That each thing is repeated for."""
MOST_DECODED = 2**26
"""Weights of the largest matrix that is decoded for its rate."""


def measure_device(
    device: torch.device, dtype: torch.dtype, tokens: int, matrix: tuple[int, ...]
) -> dict[str, Any]:
    """FLOP/s of products, and the rate at which 4-bit weights are decoded.

    Args:
        device: Which.
        dtype: Of the model's products.
        tokens: Of a micro-batch.
        matrix: Outputs and inputs of the model's largest quantised matrix.

    Returns:
        ``flops_per_second``: of a large square product; ``flops_per_second_of_the_shape``: of
        ``tokens`` x inputs by inputs x outputs; ``decoded_bytes_per_second``: read and written.
    """
    side = SIDE.get(device.type, SIDE["cpu"])
    outputs, inputs = matrix
    square = _product(device, dtype, side, side, side)
    own = _product(device, dtype, tokens, inputs, outputs)
    decode, num_bytes = _decoding(device, dtype, outputs, inputs)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "square_side": side,
        "flops_per_second": 2 * side**3 / _seconds(square, device),
        "shape_of_the_model": [tokens, inputs, outputs],
        "flops_per_second_of_the_shape": 2 * tokens * inputs * outputs / _seconds(own, device),
        "decoded_bytes_per_second": num_bytes / _seconds(decode, device),
    }


def _product(
    device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int
) -> Callable[[], Any]:
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    return lambda: torch.nn.functional.linear(left, right)


def _decoding(
    device: torch.device, dtype: torch.dtype, outputs: int, inputs: int
) -> tuple[Callable[[], Any], float]:
    from bitsandbytes import functional  # slow to import

    config = QuantizationConfig()
    rows = max(1, min(outputs, MOST_DECODED // inputs))
    width = max(config.block_size, inputs // config.block_size * config.block_size)
    codes, state = pack(torch.randn(rows, width, device=device).to(dtype), config)
    num_bytes = rows * width * (bits_per_weight(config) / 8 + dtype.itemsize)
    return lambda: functional.dequantize_4bit(codes, state), num_bytes


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one go, the best of several: whatever else is going on only makes it longer."""
    best = float("inf")
    work()
    until = time.perf_counter() + LEAST_SECONDS
    number = 0
    while time.perf_counter() < until or number < 3:
        if device.type == "cuda":
            first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            second.record()
            torch.cuda.synchronize(device)
            best = min(best, first.elapsed_time(second) / 1e3)
        else:
            began = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - began)
        number += 1
    return best
