"""Bytes on the wire per optimizer step, in closed form, for any model and number of devices.

Counted is what one device sends through its own link in one direction. An all-gather or a
reduce-scatter of B bytes in all costs each of n devices (n - 1) / n B; an all-reduce is both.
"""

from __future__ import annotations

from dataclasses import dataclass

ADAPTER_BYTES = 4
"""Adapters, and so their gradients, are float32."""
BLOCK, DOUBLE_BLOCK = 64, 256
"""Weights that share a constant, and constants that share one."""
NUM_ENDS = 3
"""Units besides the layers: embedding, head, last norm."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaMA under LoRA on all linear layers."""

    name: str
    hidden: int
    inner: int
    """Width of the feed-forward layers."""
    num_layers: int
    vocabulary: int
    key_value: int
    """Width of keys and of values."""
    rank: int = 64
    rest_bytes: int = 2
    """Of a weight that is not quantised: embedding, head, norms."""

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one decoder layer."""
        h, i, kv = self.hidden, self.inner, self.key_value
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]

    @property
    def num_quantized(self) -> int:
        """Weights in 4 bits."""
        return self.num_layers * sum(a * b for a, b in self.matrices)

    @property
    def num_adapter_weights(self) -> int:
        """Weights of all A and B."""
        return self.num_layers * self.rank * sum(a + b for a, b in self.matrices)

    @property
    def num_adapter_tensors(self) -> int:
        """All A and B."""
        return self.num_layers * 2 * len(self.matrices)

    @property
    def ends_bytes(self) -> int:
        """Embedding, head and last norm."""
        return (2 * self.vocabulary + 1) * self.hidden * self.rest_bytes

    @property
    def norm_bytes(self) -> int:
        """The two norms of one decoder layer."""
        return 2 * self.hidden * self.rest_bytes

    @property
    def constant_bytes(self) -> float:
        """What the packed matrices are decoded with (double quantisation), without code tables."""
        return self.num_quantized * (1 + 4 / DOUBLE_BLOCK) / BLOCK

    @property
    def base_bytes(self) -> float:
        """The whole base: packed, what it is decoded with, and the rest."""
        norms = self.num_layers * self.norm_bytes
        return self.num_quantized / 2 + self.constant_bytes + norms + self.ends_bytes


LLAMA_7B = Shape(
    name="7B", hidden=4096, inner=11008, num_layers=32, vocabulary=32000, key_value=4096
)
LLAMA_33B = Shape(
    name="33B", hidden=6656, inner=17920, num_layers=60, vocabulary=32000, key_value=6656
)
LLAMA_70B = Shape(
    name="70B", hidden=8192, inner=28672, num_layers=80, vocabulary=32000, key_value=1024
)
"""LLaMA 7B and 33B (Touvron et al. 2023, arXiv:2302.13971), Llama 2 70B (arXiv:2307.09288)."""


def padded(rows: int, row_bytes: int, num_devices: int) -> int:
    """Bytes of a tensor that is cut along its rows, each device's part as long as the longest."""
    return -(-rows // num_devices) * num_devices * row_bytes


def gathered_layer(shape: Shape, num_devices: int) -> int:
    """Bytes that one decoder layer's parameters take once they are together."""
    packed = sum(padded(a * b // 2, 1, num_devices) for a, b in shape.matrices)
    norms = 2 * padded(shape.hidden, shape.rest_bytes, num_devices)
    return packed + norms + adapters_of_layer(shape, num_devices)


def adapters_of_layer(shape: Shape, num_devices: int) -> int:
    """Bytes of one decoder layer's A ``(rank, inputs)`` and B ``(outputs, rank)``."""
    return sum(
        padded(shape.rank, inputs * ADAPTER_BYTES, num_devices)
        + padded(outputs, shape.rank * ADAPTER_BYTES, num_devices)
        for inputs, outputs in shape.matrices
    )


def gathered_ends(shape: Shape, num_devices: int) -> int:
    """Bytes of embedding, head and last norm once they are together."""
    row = shape.hidden * shape.rest_bytes
    norm = padded(shape.hidden, shape.rest_bytes, num_devices)
    return 2 * padded(shape.vocabulary, row, num_devices) + norm


@dataclass(frozen=True)
class Traffic:
    """Whole bytes of an optimizer step's exchanges, by kind; without bookkeeping."""

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0
    num_messages: int = 0
    """Exchanges, one after the other."""

    def sent(self, num_devices: int) -> float:
        """Bytes that each device sends."""
        share = (num_devices - 1) / num_devices
        return share * (self.all_gather + self.reduce_scatter + 2 * self.all_reduce)

    def sent_by_gloo(self, num_devices: int) -> float:
        """The same where a reduce-scatter is carried out as an all-reduce, as gloo does."""
        share = (num_devices - 1) / num_devices
        return share * (self.all_gather + 2 * self.reduce_scatter + 2 * self.all_reduce)


def num_buckets(shape: Shape, bucket_bytes: int) -> int:
    """Tensors that gradients are copied into, each up to so many bytes of whole gradients."""
    number, filled = 1, 0
    for inputs, outputs in shape.matrices * shape.num_layers:
        for size in (shape.rank * inputs * ADAPTER_BYTES, shape.rank * outputs * ADAPTER_BYTES):
            if filled and filled + size > bucket_bytes:
                number, filled = number + 1, 0
            filled += size
    return number


def ddp_traffic(shape: Shape, bucket_bytes: int = 25_000_000) -> Traffic:
    """One sum of the adapters' gradients a step, and a number that says which tensors have one."""
    total = (shape.num_adapter_weights + shape.num_adapter_tensors) * ADAPTER_BYTES
    return Traffic(all_reduce=total, num_messages=num_buckets(shape, bucket_bytes))


def fsdp2_traffic(shape: Shape, num_devices: int, accumulation: int) -> Traffic:
    """Every layer and both ends are fetched forwards and backwards, in each micro-batch.

    The embedding, which nothing is done with backwards, is fetched there too: torch fetches each
    unit while another is still computed with, whether or not it will be needed. Activations that
    are computed again find their layer fetched. Adapters' gradients are reduced in each
    micro-batch, so that no device holds all of them.
    """
    layers, a = shape.num_layers, accumulation
    whole = layers * gathered_layer(shape, num_devices) + gathered_ends(shape, num_devices)
    return Traffic(
        all_gather=2 * a * whole,
        reduce_scatter=a * layers * adapters_of_layer(shape, num_devices),
        num_messages=a * (2 * (layers + NUM_ENDS) + layers),
    )


def traffic(shape: Shape, strategy: str, num_devices: int, accumulation: int) -> Traffic:
    """Of a strategy by name; nothing for one device under ddp."""
    if strategy == "ddp":
        return ddp_traffic(shape) if num_devices > 1 else Traffic()
    return fsdp2_traffic(shape, num_devices, accumulation)
