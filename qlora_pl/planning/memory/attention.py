"""What attention keeps for the backward pass, by kernel, and the masks that it is given."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_pl.planning.memory.tape import FLOAT, Tape, Value
from qlora_pl.planning.memory.training_setting import ITEM_SIZES, TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape

WITHOUT_SDPA = ("bloom", "gemma2")
"""Families that transformers has no sdpa for, or for which it is not the default."""


@dataclass(frozen=True)
class Rows:
    """The rows of a micro-batch."""

    number: int
    length: int
    """Queries of each."""
    keys: int
    """Keys of each: as many, but where a decoder looks at its source."""

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.number * self.length


def kernel(shape: ModelShape, setting: TrainingSetting) -> str:
    """The kernel that ``auto`` comes to."""
    if setting.attention != "auto":
        return setting.attention
    return "eager" if shape.model_type in WITHOUT_SDPA else "sdpa"


def has_mask(shape: ModelShape, setting: TrainingSetting) -> bool:
    """Whether the kernel is given a mask, which no kernel of linear memory takes."""
    if kernel(shape, setting) == "eager" or shape.is_t5 or shape.model_type in ("bloom", "falcon"):
        return True  # these are always given one
    return setting.has_mask or setting.is_packed


def attend(
    tape: Tape,
    shape: ModelShape,
    rows: Rows,
    q: Value,
    k: Value,
    v: Value,
    *,
    num_kv_heads: int | None = None,
    is_float_mask: bool = False,
    is_contiguous: bool = False,
    is_across: bool = False,
) -> Value:
    """Attention itself, from queries, keys and values with their positions to its output.

    Args:
        tape: Where to note.
        shape: The model's.
        rows: Of the micro-batch.
        q: ``(B, H, S, D)``, or what it is a view of.
        k: ``(B, K, S, D)``, likewise.
        v: As ``k``.
        num_kv_heads: K, where a family has repeated heads already.
        is_float_mask: Whether the mask is one number for each pair already, not a boolean.
        is_contiguous: Whether queries lie head by head; kernels answer in the same layout, and the
            next product needs the other.
        is_across: Whether a decoder looks at its source.
    """
    if not (q.has_grad or k.has_grad or v.has_grad):
        return tape.new(rows.tokens * shape.queries_size, None, False)
    heads = shape.num_kv_heads if num_kv_heads is None else num_kv_heads
    if kernel(shape, tape.setting) == "eager":
        out = _eager(tape, shape, rows, q, k, v, heads)
    elif _is_unfused(shape, tape.setting, heads, is_across):
        out = _unfused(tape, shape, rows)
    else:
        out = _fused(tape, shape, rows, q, k, v, heads, is_float_mask)
        if is_contiguous:
            out = tape.like(out)
    tape.end_attention()
    return out


def _is_unfused(
    shape: ModelShape, setting: TrainingSetting, num_heads: int, is_across: bool
) -> bool:
    """Whether no fused kernel takes what a family hands over.

    Falcon's single key and value head as it is; and on a CPU, the biases of T5's layers across,
    which are zeros that ask for a gradient when activations are computed again.
    """
    if is_across and setting.gradient_checkpointing and setting.device == "cpu":
        return True
    return shape.model_type == "falcon" and num_heads < shape.num_heads


def _repeated(
    tape: Tape, shape: ModelShape, rows: Rows, x: Value, num_heads: int, is_copied: bool
) -> Value:
    """Keys or values once for each query head; of a single head all are views."""
    if num_heads == shape.num_heads or (num_heads == 1 and not is_copied):
        return x
    return tape.new(rows.number * rows.keys * shape.queries_size, x.item, x.has_grad)


def _fused(
    tape: Tape,
    shape: ModelShape,
    rows: Rows,
    q: Value,
    k: Value,
    v: Value,
    num_heads: int,
    is_float_mask: bool,
) -> Value:
    is_masked = has_mask(shape, tape.setting)
    if is_masked:
        k, v = (_repeated(tape, shape, rows, x, num_heads, False) for x in (k, v))
    out = tape.new(rows.tokens * shape.queries_size)
    sums = tape.new(rows.tokens * shape.num_heads, FLOAT)
    tape.keep(tape.cast(q), tape.cast(k), tape.cast(v), out, sums)
    if is_masked and not is_float_mask:  # the kernel makes numbers of booleans, in each layer
        heads = shape.num_heads if shape.is_t5 else 1  # with T5's biases of positions
        tape.keep(tape.new(heads * rows.number * rows.length * rows.keys))
    return out


def _unfused(tape: Tape, shape: ModelShape, rows: Rows) -> Value:
    """Torch's own fallback, in float32 over copies for every head.

    Falcon hands its single key and value head over as it is, which no fused kernel takes.
    """
    size = rows.tokens * shape.queries_size
    pairs = rows.number * shape.num_heads * rows.length * rows.keys
    tape.keep(tape.new(pairs, FLOAT), *(tape.new(size, FLOAT) for _ in "qkv"))
    return tape.new(size)


def _eager(
    tape: Tape, shape: ModelShape, rows: Rows, q: Value, k: Value, v: Value, num_heads: int
) -> Value:
    is_copied = rows.number > 1  # a product takes all heads of all rows as one batch
    k, v = (_repeated(tape, shape, rows, x, num_heads, is_copied) for x in (k, v))
    if is_copied:
        keys = rows.number * rows.keys * shape.queries_size
        q, k, v = (
            tape.new(size, x.item, x.has_grad)
            for x, size in ((q, rows.tokens * shape.queries_size), (k, keys), (v, keys))
        )
    tape.keep(tape.cast(q), tape.cast(k))
    pairs = rows.number * shape.num_heads * rows.length * rows.keys
    if shape.fields.get("attn_logit_softcapping"):
        tape.keep(tape.new(pairs))  # tanh
    probabilities = tape.new(pairs, FLOAT if has_exact_softmax(shape) else None)
    tape.keep(probabilities)
    if probabilities.item != tape.item:
        probabilities = tape.new(pairs)
    probabilities = tape.dropout(probabilities, dropout_rate(shape))
    tape.keep(probabilities, tape.cast(v))
    return tape.new(rows.tokens * shape.queries_size)


def has_exact_softmax(shape: ModelShape) -> bool:
    """Whether an eager kernel takes the softmax in float32."""
    return shape.model_type not in ("gpt2", "falcon", "t5", "mt5")


def working(shape: ModelShape, setting: TrainingSetting, rows: Rows) -> int:
    """What its backward pass needs beyond what was kept."""
    item = ITEM_SIZES[setting.compute_dtype]
    pairs = rows.number * shape.num_heads * rows.length * rows.keys
    if kernel(shape, setting) == "eager":
        # gradients before and after the softmax; its float32 result has replaced the one in 16 bits
        return pairs * (2 * FLOAT - item if has_exact_softmax(shape) else 2 * item)
    if shape.model_type == "falcon" and shape.fields.get("multi_query"):
        return pairs * 2 * FLOAT
    return 4 * rows.tokens * shape.queries_size * item  # of queries, keys, values and the output


def dropout_rate(shape: ModelShape) -> float:
    """The base's own dropout of probabilities."""
    names = ("attn_pdrop", "attention_dropout", "dropout_rate")
    return float(next((shape.fields[n] for n in names if shape.fields.get(n)), 0))
