"""Seconds of an optimizer step on 8 to 1024 GPUs, computed and not measured.

Communication is the bytes of wire.py over a link's speed and a latency for each hop of a ring;
arithmetic is the FLOPs of a frozen base over the speed of a matrix product. Nothing overlaps, so
the truth lies between the larger of the two and their sum.
"""

from __future__ import annotations

from typing import Any

from wire import LLAMA_7B, LLAMA_33B, LLAMA_70B, Shape, traffic

NVLINK = "NVLink, 450 GB/s"
LINKS = {
    NVLINK: (450e9, 3e-6),
    "400 Gb/s": (50e9, 10e-6),
    "100 Gb/s": (12.5e9, 10e-6),
    "10 GbE": (1.25e9, 50e-6),
}
"""Bytes a second in one direction of the slowest link of the ring, and seconds a hop (assumed)."""
FLOPS = 790e12
"""Of bfloat16 matrix products on an H200: 80 % of the data sheet's 989e12."""
TOKENS = 2048
"""Of a micro-batch of one device, one sequence."""
COUNTS = (8, 64, 256, 1024)
OF_ONE_MACHINE = 8
"""GPUs that NVLink joins; a ring over more of them runs at the speed of the network between."""


def flops_per_token(shape: Shape, length: int, recomputes: bool = True) -> float:
    """Of a forward and a backward pass over a frozen base, gradients of adapters alone.

    Args:
        shape: The model.
        length: Of the sequences, for causal attention.
        recomputes: Whether activations are computed again in the backward pass.
    """
    lora = shape.num_adapter_weights  # rank times inputs plus outputs
    head = 2 * shape.vocabulary * shape.hidden
    attention = 2 * length * shape.hidden * shape.num_layers
    layers = 2 * shape.num_quantized
    forward = layers + head + 2 * lora + attention
    backward = layers + head + 4 * lora + 2.5 * attention
    return forward + backward + (layers + 2 * lora + attention if recomputes else 0)


def communication_seconds(
    shape: Shape, strategy: str, num_devices: int, accumulation: int, link: str
) -> float:
    """Of an optimizer step: bytes that a device sends, and hops of the ring one after the other."""
    speed, latency = LINKS[link]
    exchanged = traffic(shape, strategy, num_devices, accumulation)
    hops = (num_devices - 1) * exchanged.num_messages * (2 if exchanged.all_reduce else 1)
    return exchanged.sent(num_devices) / speed + hops * latency


def arithmetic_seconds(shape: Shape, accumulation: int) -> float:
    """Of an optimizer step on one device."""
    return accumulation * TOKENS * flops_per_token(shape, TOKENS) / FLOPS


def table(accumulation: int) -> list[dict[str, Any]]:
    """Every model, strategy, number of devices and link."""
    return [
        {
            "model": shape.name,
            "strategy": strategy,
            "devices": num_devices,
            "accumulation": accumulation,
            "arithmetic_seconds": arithmetic_seconds(shape, accumulation),
            "sent_bytes": traffic(shape, strategy, num_devices, accumulation).sent(num_devices),
            "communication_seconds": {
                link: communication_seconds(shape, strategy, num_devices, accumulation, link)
                for link in LINKS
                if num_devices <= OF_ONE_MACHINE or link != NVLINK
            },
        }
        for shape in (LLAMA_7B, LLAMA_33B, LLAMA_70B)
        for strategy in ("ddp", "fsdp2")
        for num_devices in COUNTS
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/distributed.md."""
    lines = [
        f"| model | strategy | GPUs | GB sent | {' | '.join(LINKS)} | arithmetic |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in LINKS)} | --- |",
    ]
    for row in rows:
        by_link = row["communication_seconds"]
        seconds = [_seconds(by_link[link]) if link in by_link else "" for link in LINKS]
        lines.append(
            f"| {row['model']} | {row['strategy']} | {row['devices']} | "
            f"{row['sent_bytes'] / 1e9:.2f} | {' | '.join(seconds)} | "
            f"{_seconds(row['arithmetic_seconds'])} |"
        )
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"
