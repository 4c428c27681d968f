"""How much arithmetic and memory traffic a run is, and how long a card would take over it.

In: the sizes of a model's parts. Out: operations and bytes, then seconds on a ``Card``. Without
torch, so that a plan answers at once; ``modeling.compute`` counts the same of a loaded model.

The estimate adds what a GPU does one after another: matrix products at a share of the peak, the
decoding of packed weights and the element-wise operations at a share of the bandwidth; or it takes
the launching of kernels, where that is slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_pl.planning.work.cards import Card

PRODUCT_EFFICIENCY = 0.65
"""Share of the peak that 16-bit products are taken to reach. With it and the next the estimate is
unbiased over twelve published throughputs of other programs (3B to 72B, five kinds of cards): their
geometric mean is 1.00 of it, and single ones lie between 0.7 and 1.5 times it."""
BANDWIDTH_EFFICIENCY = 0.8
"""Share of the peak that element-wise kernels and decoding are taken to reach."""
LAUNCH_SECONDS = 2e-3
"""Of one layer, forward and backward: some 300 operations at 7 microseconds each."""
DECODED_BYTES = 2.516
"""Traffic of decoding a weight of NF4 with double quantisation: 0.516 read, 2 written."""
ELEMENTWISE_FORWARD = 16.0
"""Bytes that a token moves in a forward pass outside of products, for each input and each output of
its layer's linear modules: operand by operand over LLaMA's layers with adapters, bfloat16."""
ELEMENTWISE_BACKWARD = 22.5
DROPOUT_FORWARD = 6.4
"""What dropout on the adapters' inputs adds."""
DROPOUT_BACKWARD = 2.7


@dataclass(frozen=True, kw_only=True)
class Work:
    """The sizes that arithmetic and traffic follow from; weights and multiplications are one."""

    matrices: int
    """Weights of the frozen matrices that every token passes (of an encoder-decoder model: that
    source tokens pass)."""
    head: int
    """Weights of the output head, which only trained tokens pass."""
    adapters: int
    """Trained weights of matrices."""
    attention: int
    """Heads x head size, summed over layers."""
    sides: int
    """Inputs and outputs of all linear modules of the layers, summed."""
    num_layers: int
    target_matrices: int = 0
    """As ``matrices``, of what only target tokens pass."""
    target_adapters: int = 0
    packed: int = 0
    """Weights that are decoded before they are multiplied by; 0: none is quantised."""
    recomputes: bool = False
    """Whether activations are computed again in the backward pass."""
    has_dropout: bool = False
    trains_base: bool = False
    """Whether the matrices themselves are trained, which is half as much again."""

    @property
    def num_passes(self) -> int:
        """How often a micro-batch needs each weight."""
        return 3 if self.recomputes else 2

    def model_flops(self, tokens: int, trained: int, pairs: int) -> float:
        """Operations of forward and backward, without what is computed twice.

        Four for each frozen weight and token, not the six of full fine-tuning, since a frozen
        weight has no gradient.

        Args:
            tokens: Without padding; of an encoder-decoder model, sources and targets.
            trained: Tokens that pass the head; with an encoder, all of the targets.
            pairs: Products of row lengths with themselves, summed.
        """
        has_encoder = self.target_matrices > 0
        read = tokens - trained if has_encoder else tokens
        of_matrix = 6 if self.trains_base else 4
        products = read * (of_matrix * self.matrices + 6 * self.adapters)
        products += trained * (of_matrix * self.target_matrices + 6 * self.target_adapters)
        return float(products + 6 * self.attention * pairs + of_matrix * trained * self.head)

    def hardware_flops(self, tokens: int, trained: int, pairs: int) -> float:
        """The same with what checkpointing computes a second time."""
        flops = self.model_flops(tokens, trained, pairs)
        if not self.recomputes:
            return flops
        has_encoder = self.target_matrices > 0
        read = tokens - trained if has_encoder else tokens
        again = read * (self.matrices + self.adapters)
        again += trained * (self.target_matrices + self.target_adapters)
        return float(flops + 2 * again + 2 * self.attention * pairs)

    @property
    def decoding_bytes(self) -> float:
        """Traffic of decoding in one micro-batch, whatever its size."""
        return self.num_passes * DECODED_BYTES * self.packed

    def elementwise_bytes(self, tokens: int) -> float:
        """Traffic of everything between the products."""
        forward = ELEMENTWISE_FORWARD + DROPOUT_FORWARD * self.has_dropout
        backward = ELEMENTWISE_BACKWARD + DROPOUT_BACKWARD * self.has_dropout
        return (forward * (self.num_passes - 1) + backward) * self.sides * tokens


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a micro-batch holds on average, padding included in ``tokens``."""

    tokens: float
    trained: float
    pairs: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a micro-batch on a card, by what takes them."""

    products: float
    decoding: float
    elementwise: float
    launching: float
    """Of the processor that starts the kernels; it counts where it is longer than the rest."""

    @property
    def total(self) -> float:
        """Of a micro-batch."""
        return max(self.products + self.decoding + self.elementwise, self.launching)


def micro_batch_time(work: Work, batch: Batch, card: Card) -> StepTime | None:
    """How long a card takes over one micro-batch; None: its speed is not known."""
    if card.flops is None or card.bandwidth is None:
        return None
    flops = work.hardware_flops(round(batch.tokens), round(batch.trained), round(batch.pairs))
    bandwidth = card.bandwidth * BANDWIDTH_EFFICIENCY
    return StepTime(
        products=flops / (card.flops * PRODUCT_EFFICIENCY),
        decoding=work.decoding_bytes / bandwidth,
        elementwise=work.elementwise_bytes(round(batch.tokens)) / bandwidth,
        launching=LAUNCH_SECONDS * work.num_layers,
    )


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """What a run takes of a card, or of several alike."""

    tokens_per_second: float
    """Over all cards, padding included."""
    hours: float | None
    """None: the number of steps is not known."""
    kilowatt_hours: float | None
    """At the boards' full power."""
    price: float | None
    """US dollars, of all cards."""
    share_of_peak: float
    """Operations, recomputed ones included, over what the card could do at its peak (HFU)."""
    share_without_recomputing: float
    """The same without what is computed twice (MFU)."""


def run_time(
    work: Work,
    batch: Batch,
    card: Card,
    num_cards: int,
    num_micro_batches: float | None,
) -> RunTime | None:
    """What a run takes; None: the card's speed is not known.

    Args:
        work: Of the model.
        batch: A micro-batch.
        card: One of the cards.
        num_cards: That work side by side, each on a micro-batch of its own.
        num_micro_batches: Of the whole run on each card; None: not known.
    """
    time = micro_batch_time(work, batch, card)
    if time is None or card.flops is None:
        return None
    hours = None if num_micro_batches is None else num_micro_batches * time.total / 3600
    card_hours = None if hours is None else hours * num_cards
    counts = round(batch.tokens), round(batch.trained), round(batch.pairs)
    return RunTime(
        tokens_per_second=num_cards * batch.tokens / time.total,
        hours=hours,
        kilowatt_hours=_product(card_hours, card.watts, 1e-3),
        price=_product(card_hours, card.price_per_hour, 1.0),
        share_of_peak=work.hardware_flops(*counts) / time.total / card.flops,
        share_without_recomputing=work.model_flops(*counts) / time.total / card.flops,
    )


def _product(hours: float | None, rate: float | None, scale: float) -> float | None:
    return None if hours is None or rate is None else hours * rate * scale
