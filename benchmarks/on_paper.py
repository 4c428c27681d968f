"""Seconds of an optimizer step on 8 to 1024 GPUs, computed and not measured.

Communication is the bytes of wire.py over a link's speed and a latency for each hop of a ring;
arithmetic is the FLOPs of a frozen base over the speed of a matrix product. Nothing overlaps, so
the truth lies between the larger of the two and their sum.
"""

from __future__ import annotations

from typing import Any

from wire import LLAMA_7B, LLAMA_33B, LLAMA_70B, Shape, traffic

LINKS = {
    "NVLink, 450 GB/s": (450e9, 3e-6),
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
        seconds = [_seconds(value) for value in row["communication_seconds"].values()]
        lines.append(
            f"| {row['model']} | {row['strategy']} | {row['devices']} | "
            f"{row['sent_bytes'] / 1e9:.2f} | {' | '.join(seconds)} | "
            f"{_seconds(row['arithmetic_seconds'])} |"
        )
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def memory(shape: Shape, num_devices: int, tokens: int = TOKENS) -> dict[str, float]:
    """Bytes on each of several GPUs under fsdp2, by what they are, with 32-bit AdamW.

    Args:
        shape: The model.
        num_devices: That share it.
        tokens: Of a micro-batch; activations of one layer at a time are recomputed.
    """
    packed = shape.num_quantized / 2 + shape.num_layers * shape.norm_bytes + shape.ends_bytes
    layer = sum(a * b for a, b in shape.matrices) / 2 + shape.norm_bytes
    of_layer = shape.num_adapter_weights / shape.num_layers * 4
    width, inner, key_value = shape.hidden, shape.inner, shape.key_value
    # bf16 numbers a token that one layer keeps for its backward pass, eager PEFT, no dropout:
    # performance formula 14h + 4h(1 + kv/h) + 8i + 14r bytes
    kept = 14 * width + 4 * (width + key_value) + 8 * inner + 14 * shape.rank
    return {
        "part of the base": packed / num_devices,
        "constants, whole": shape.constant_bytes,
        "two layers and the ends, whole": 2 * (layer + of_layer) + shape.ends_bytes,
        "a matrix decoded to bfloat16": 2 * max(a * b for a, b in shape.matrices),
        "part of adapters, gradients, AdamW": 16 * shape.num_adapter_weights / num_devices,
        "activations": tokens * (2 * width * shape.num_layers + kept),
        "logits and their gradients": 12.0 * tokens * shape.vocabulary,
    }
