"""What a micro-batch keeps between its forward and its backward pass, and what it needs besides."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_pl.planning.attention import Rows, has_mask, kernel
from qlora_pl.planning.layers import final_norm, run_layer, t5_layer
from qlora_pl.planning.shapes import ModelShape
from qlora_pl.planning.storage import num_packed
from qlora_pl.planning.tape import FLOAT, INDEX, Tape
from qlora_pl.planning.trained import adapted_matrices
from qlora_pl.planning.training_setting import ITEM_SIZES, TrainingSetting

CHUNK_TOKENS = 1024
"""Trained tokens whose float32 logits exist at a time; see ``modeling.steps.loss``."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch on one device."""

    layers: tuple[int, ...]
    """What each layer keeps, in the order of the forward pass. The first one's input needs no
    gradient unless embeddings are trained."""
    inputs: tuple[int, ...]
    """What each keeps if its activations are computed again: its input."""
    shared: int
    """What layers share: sines and cosines, an encoder's output."""
    held_masks: int
    """Masks, which only layers that are computed again hold on to."""
    ends: int
    """From the last layer to the head."""
    logits: int
    """What head and loss keep."""
    logits_peak: int
    """The most that head and loss have at a time, forward or backward."""
    working: int
    """What one layer's backward pass needs beyond what was kept."""

    def of_layers(self, checkpointing: bool) -> int:
        """What all layers keep."""
        own = self.inputs if checkpointing else self.layers
        return sum(own) + (self.held_masks if checkpointing else 0)

    def kept(self, checkpointing: bool) -> int:
        """What is kept between forward and backward, logits included."""
        return self.of_layers(checkpointing) + self.shared + self.ends + self.logits


def activations(shape: ModelShape, setting: TrainingSetting) -> Activations:
    """Derive what a micro-batch keeps from the operations of the model's family."""
    rows = Rows(setting.batch_size, setting.tokens_per_row, setting.tokens_per_row)
    make_tape = _TapeMaker(shape, setting)
    if shape.is_t5:
        layers, inputs, shared, last = _t5_layers(shape, setting, rows, make_tape)
    else:
        layers, inputs = _decoder_layers(shape, setting, rows, make_tape)
        shared, last = _turning(shape, setting, rows), rows
    kept, peak = _logits(shape, setting, last)
    return Activations(
        layers=layers,
        inputs=inputs,
        shared=shared + _biases_of_positions(shape, setting, rows),
        held_masks=_masks(shape, setting, rows),
        ends=_ends(shape, setting, last, make_tape),
        logits=kept,
        logits_peak=peak,
        working=_working(shape, setting, rows),
    )


class _TapeMaker:
    def __init__(self, shape: ModelShape, setting: TrainingSetting) -> None:
        self.setting = setting
        self.ranks = {group.matrix.module: group.rank for group in adapted_matrices(shape, setting)}
        self.trains_embedding = not setting.has_adapters or setting.num_trained_rows > 0

    def __call__(self) -> Tape:
        return Tape(self.setting, self.ranks)


def _decoder_layers(
    shape: ModelShape, setting: TrainingSetting, rows: Rows, make_tape: _TapeMaker
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes = []
    for has_grad in (make_tape.trains_embedding or _norms_embedding(shape, setting), True):
        tape = make_tape()
        x = tape.new(rows.tokens * shape.hidden_size, tape.stream, has_grad)
        run_layer(tape, shape, rows, x)
        sizes.append(tape.total)
    first, other = sizes
    own_input = x.size * x.item
    others = shape.num_layers - 1
    return (first, *[other] * others), (own_input,) * shape.num_layers


def _norms_embedding(shape: ModelShape, setting: TrainingSetting) -> bool:
    """Whether something between embedding and layers is trained."""
    return shape.model_type == "bloom" and setting.bias == "all"


def _t5_layers(
    shape: ModelShape, setting: TrainingSetting, rows: Rows, make_tape: _TapeMaker
) -> tuple[tuple[int, ...], tuple[int, ...], int, Rows]:
    """Layers of both halves, the encoder's output, and the rows that the head is given."""
    target = setting.target_tokens_per_row or setting.tokens_per_row
    written = Rows(setting.batch_size, target, target)
    layers: list[int] = []
    inputs: list[int] = []
    for of, number, has_source in (
        (rows, shape.num_encoder_layers, False),
        (written, shape.num_layers, True),
    ):
        for index in range(number):
            tape = make_tape()
            x = tape.new(
                of.tokens * shape.hidden_size,
                tape.stream,
                index > 0 or make_tape.trains_embedding,
            )
            encoded = tape.new(rows.tokens * shape.hidden_size, tape.stream)
            source = (rows, tape.counted_elsewhere(encoded)) if has_source else None
            t5_layer(tape, shape, of, x, source)
            layers.append(tape.total)
            inputs.append(x.size * x.item)
    tape = make_tape()
    read = tape.new(rows.tokens * shape.hidden_size, tape.stream)
    tape.keep(final_norm(tape, shape, read))
    return tuple(layers), tuple(inputs), tape.total, written


def _turning(shape: ModelShape, setting: TrainingSetting, rows: Rows) -> int:
    """Sines and cosines of positions, in the type of the sums between layers."""
    if shape.fields.get("alibi") or shape.model_type in ("bloom", "opt", "gpt2"):
        return 0
    part = float(shape.fields.get("rotary_pct") or shape.fields.get("partial_rotary_factor") or 1)
    lines = rows.number if setting.is_packed else 1
    turned = int(shape.head_size * part)
    return 2 * lines * rows.length * turned * ITEM_SIZES[setting.rest_dtype]


def _biases_of_positions(shape: ModelShape, setting: TrainingSetting, rows: Rows) -> int:
    """Falcon RW's: one number for each pair and head, made once and kept by the fused kernel."""
    if not shape.fields.get("alibi") or kernel(shape, setting) == "eager":
        return 0
    return rows.number * shape.num_heads * rows.length**2 * ITEM_SIZES[setting.compute_dtype]


def _masks(shape: ModelShape, setting: TrainingSetting, rows: Rows) -> int:
    if not has_mask(shape, setting) or shape.fields.get("alibi"):
        return 0
    is_bool = kernel(shape, setting) != "eager"
    return rows.number * rows.length**2 * (1 if is_bool else ITEM_SIZES[setting.rest_dtype])


def _ends(shape: ModelShape, setting: TrainingSetting, rows: Rows, make_tape: _TapeMaker) -> int:
    tape = make_tape()
    normed = final_norm(tape, shape, tape.new(rows.tokens * shape.hidden_size, tape.stream))
    if shape.is_t5:
        tape.dropout(normed, float(shape.fields.get("dropout_rate") or 0))
    picked = _num_trained(shape, setting, rows)
    tape.keep(tape.new(2 * picked, INDEX))  # which positions the head is asked for
    if not setting.has_adapters:
        tape.keep(tape.new(picked * shape.hidden_size))
    if setting.uses_autocast and ITEM_SIZES[setting.rest_dtype] != tape.item:
        tape.keep(tape.new(shape.vocabulary_size * shape.hidden_size))  # the head, cast
    return tape.total


def _num_trained(shape: ModelShape, setting: TrainingSetting, rows: Rows) -> int:
    if not shape.is_t5:
        return setting.num_trained_tokens
    return rows.tokens if setting.trained_tokens is None else setting.trained_tokens


def _logits(shape: ModelShape, setting: TrainingSetting, rows: Rows) -> tuple[int, int]:
    """What head and loss keep, and the most that they have at a time."""
    number, words = _num_trained(shape, setting, rows), shape.vocabulary_size
    item = ITEM_SIZES[setting.compute_dtype]
    chunk = min(number, CHUNK_TOKENS)
    own = number * words * item
    exact = chunk * words * FLOAT
    small = number * (2 * INDEX + FLOAT)  # labels, positions and weights of the losses
    if shape.fields.get("final_logit_softcapping"):
        small += own  # tanh
    if number <= CHUNK_TOKENS:
        return exact + small, 3 * exact + small
    return own + small, max(2 * own + 3 * exact, 3 * own) + small


def _working(shape: ModelShape, setting: TrainingSetting, rows: Rows) -> int:
    """Gradients that exist at a time within a layer, at its widest place."""
    item = ITEM_SIZES[setting.compute_dtype]
    in_mlp = (3 if shape.is_gated else 2) * shape.mlp_size + 2 * shape.hidden_size
    widest = rows.tokens * in_mlp * item
    if kernel(shape, setting) == "eager":
        pairs = rows.number * shape.num_heads * rows.length * rows.keys
        widest = max(widest, pairs * (2 * FLOAT + item))
    return widest


def dequantization(shape: ModelShape, setting: TrainingSetting) -> int:
    """Bytes of the largest packed matrix while it is multiplied by, in the products' type."""
    packed = [p for p in shape.linears if num_packed(p, setting)]
    if not packed:
        return 0
    largest = max(p.size for p in packed)
    scales = FLOAT * -(-largest // setting.block_size) if setting.double_quant else 0
    return largest * ITEM_SIZES[setting.compute_dtype] + (scales if setting.is_four_bits else 0)
