"""What a micro-batch keeps between its forward and its backward pass, and what it needs besides."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_pl.planning.memory import attention
from qlora_pl.planning.memory.attention import Rows, has_mask, kernel
from qlora_pl.planning.memory.layers import final_norm, run_layer, t5_layer
from qlora_pl.planning.memory.storage import num_packed
from qlora_pl.planning.memory.tape import FLOAT, INDEX, Tape
from qlora_pl.planning.memory.trained import adapted_matrices
from qlora_pl.planning.memory.training_setting import ITEM_SIZES, TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape

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
    layer_peak: int
    """The most that one layer has in its backward pass: what it kept, gradients, and the matrix
    that is multiplied by (``dequantized`` bytes of it). Its input is not in it."""
    dequantized: int
    """The largest packed matrix, while it is multiplied by."""

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
        layer_peak=_layer_peak(shape, setting, rows, make_tape),
        dequantized=dequantization(shape, setting),
    )


class _TapeMaker:
    def __init__(self, shape: ModelShape, setting: TrainingSetting) -> None:
        self.setting = setting
        self.ranks = {group.matrix.module: group.rank for group in adapted_matrices(shape, setting)}
        # with checkpointing, transformers has the embedding's output ask for a gradient
        self.trains_embedding = (
            not setting.has_adapters
            or setting.num_trained_rows > 0
            or setting.gradient_checkpointing
        )

    def __call__(self) -> Tape:
        return Tape(self.setting, self.ranks)


def _decoder_layers(
    shape: ModelShape, setting: TrainingSetting, rows: Rows, make_tape: _TapeMaker
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes = []
    for has_grad in (make_tape.trains_embedding, True):
        tape = make_tape()
        x = tape.new(rows.tokens * shape.hidden_size, tape.stream, has_grad)
        run_layer(tape, shape, rows, x)
        sizes.append(tape.total)
    first, other = sizes
    own_input = x.size * x.item
    others = shape.num_layers - 1
    return (first, *[other] * others), (own_input,) * shape.num_layers


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
    item = ITEM_SIZES[setting.rest_dtype]
    each = 1 if kernel(shape, setting) != "eager" else item
    if not shape.is_t5:
        return rows.number * rows.length**2 * each
    target = setting.target_tokens_per_row or setting.tokens_per_row
    pairs = rows.length**2 + target**2 + target * rows.length  # of both sides, and across
    return pairs * (rows.number * each + shape.num_heads * item)  # with biases of positions


def _ends(shape: ModelShape, setting: TrainingSetting, rows: Rows, make_tape: _TapeMaker) -> int:
    tape = make_tape()
    size = rows.tokens * shape.hidden_size
    embedded = tape.new(size, tape.stream, make_tape.trains_embedding)
    if setting.gradient_checkpointing and shape.model_type in ("gpt2", "opt"):
        tape.keep(embedded)  # no layer's input, since positions are added to it
    if shape.model_type == "bloom":
        tape.layer_norm(embedded, shape.hidden_size)
    rates = (shape.fields.get(name) for name in ("embd_pdrop", "hidden_dropout", "dropout_rate"))
    if shape.model_type in ("gpt2", "gpt_neox", "t5", "mt5"):
        tape.dropout(embedded, float(next((rate for rate in rates if rate), 0)))
    normed = final_norm(tape, shape, tape.new(size, tape.stream))
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


def _layer_peak(
    shape: ModelShape, setting: TrainingSetting, rows: Rows, make_tape: _TapeMaker
) -> int:
    tape = make_tape()
    x = tape.counted_elsewhere(tape.new(rows.tokens * shape.hidden_size, tape.stream))
    if shape.is_t5:
        source = tape.counted_elsewhere(tape.new(x.size, tape.stream))
        t5_layer(tape, shape, rows, x, (rows, source))
    else:
        run_layer(tape, shape, rows, x)
    stream = x.size * x.item  # the gradient that has come so far
    in_mlp = tape.total + _working_of_mlp(shape, setting, rows)
    in_attention = tape.until_attention + attention.working(shape, setting, rows)
    return stream + max(in_mlp, in_attention)


def _working_of_mlp(shape: ModelShape, setting: TrainingSetting, rows: Rows) -> int:
    """What the MLP's backward pass has beyond what it kept, at its widest place.

    The input of its last product is given back before its gradient is whole: adapters come first.
    """
    is_wide = setting.is_quantized and setting.uses_autocast
    item = ITEM_SIZES[setting.rest_dtype if is_wide else setting.compute_dtype]
    inner = rows.tokens * shape.mlp_size * item
    gradients = {"bloom": 5, "gelu_new": 3}  # whose derivatives are written out in steps
    in_steps = gradients.get(shape.model_type) or gradients.get(shape.activation)
    of_function = inner * (in_steps or (2 if shape.is_gated else 1))
    return max(of_function, inner + dequantization(shape, setting))


def dequantization(shape: ModelShape, setting: TrainingSetting) -> int:
    """Bytes of the largest packed matrix while it is multiplied by, in the products' type.

    DoRA besides multiplies its adapters out, in float32 and from an identity.
    """
    packed = [p for p in shape.linears if num_packed(p, setting)]
    item = ITEM_SIZES[setting.compute_dtype]
    largest = max((p.size for p in packed), default=0)
    scales = 0
    if setting.is_four_bits and setting.double_quant:
        scales = FLOAT * -(-largest // setting.block_size)
    merged = 0
    if setting.method == "dora":
        adapted = [group.matrix for group in adapted_matrices(shape, setting)]
        merged = max(FLOAT * (p.inputs**2 + 3 * p.size) for p in adapted)
    return largest * item + scales + merged
