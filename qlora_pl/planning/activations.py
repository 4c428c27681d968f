"""What a micro-batch keeps between its forward and its backward pass, and what it needs besides."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_pl.planning.attention import Rows, has_mask, kernel
from qlora_pl.planning.layers import layer_of
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

    first_layer: int
    """What the first layer keeps: its input needs no gradient unless embeddings are trained."""
    layer: int
    """What every other layer keeps."""
    num_layers: int
    checkpoint: int
    """What a layer keeps whose activations are computed again: its input."""
    shared: int
    """What all layers share: sines and cosines, masks."""
    ends: int
    """Before the first layer, and from the last one to the head."""
    logits: int
    """What head and loss keep."""
    logits_peak: int
    """The most that head and loss have at a time, forward or backward."""
    working: int
    """What one layer's backward pass needs beyond what was kept."""

    @property
    def all_layers(self) -> int:
        """What all layers keep without checkpointing."""
        return self.first_layer + (self.num_layers - 1) * self.layer

    @property
    def checkpoints(self) -> int:
        """What all layers keep with checkpointing."""
        return self.num_layers * self.checkpoint

    def kept(self, checkpointing: bool) -> int:
        """What is kept between forward and backward, logits included."""
        layers = self.checkpoints if checkpointing else self.all_layers
        return layers + self.shared + self.ends + self.logits


def activations(shape: ModelShape, setting: TrainingSetting) -> Activations:
    """Derive what a micro-batch keeps from the operations of the model's family."""
    rows = Rows(setting.batch_size, setting.tokens_per_row, setting.tokens_per_row)
    ranks = {group.matrix.module: group.rank for group in adapted_matrices(shape, setting)}
    trains_embedding = not setting.has_adapters or setting.num_trained_rows > 0
    tokens, width = rows.tokens, shape.hidden_size
    sizes = []
    for has_grad in (trains_embedding, True):
        tape = Tape(setting, ranks)
        x = tape.new(tokens * width, None, has_grad)
        layer_of(shape)(tape, shape, rows, x)
        sizes.append(tape.total)
    item = ITEM_SIZES[setting.compute_dtype]
    kept, peak = _logits(shape, setting)
    return Activations(
        first_layer=sizes[0],
        layer=sizes[1],
        num_layers=shape.num_layers + shape.num_encoder_layers,
        checkpoint=tokens * width * item,
        shared=_shared(shape, setting, rows),
        ends=_ends(shape, setting, rows, ranks),
        logits=kept,
        logits_peak=peak,
        working=_working(shape, setting, rows),
    )


def _shared(shape: ModelShape, setting: TrainingSetting, rows: Rows) -> int:
    item = ITEM_SIZES[setting.compute_dtype]
    is_rotary = not shape.fields.get("alibi") and shape.model_type not in ("bloom", "opt", "gpt2")
    total = 0
    if is_rotary:
        part = float(shape.fields.get("rotary_pct") or 1)
        lines = rows.number if setting.is_packed else 1
        total += 2 * lines * rows.length * int(shape.head_size * part) * item
    if has_mask(shape, setting) and setting.gradient_checkpointing:
        # layers that are computed again hold on to the mask that they were given
        is_bool = kernel(shape, setting) != "eager"
        total += rows.number * rows.length * rows.keys * (1 if is_bool else item)
    return total


def _ends(shape: ModelShape, setting: TrainingSetting, rows: Rows, ranks: dict[str, int]) -> int:
    from qlora_pl.planning.layers import final_norm

    tape = Tape(setting, ranks)
    final_norm(tape, shape, tape.new(rows.tokens * shape.hidden_size))
    picked = setting.num_trained_tokens
    tape.keep(tape.new(2 * picked, INDEX))  # which positions the head is asked for
    return tape.total


def _logits(shape: ModelShape, setting: TrainingSetting) -> tuple[int, int]:
    """What head and loss keep, and the most that they have at a time."""
    number, words = setting.num_trained_tokens, shape.vocabulary_size
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
