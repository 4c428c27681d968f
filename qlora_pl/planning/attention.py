"""What attention keeps for the backward pass, by kernel, and the masks that it is given."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_pl.planning.shapes import ModelShape
from qlora_pl.planning.tape import FLOAT, Tape, Value
from qlora_pl.planning.training_setting import TrainingSetting

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
    is_float_mask: bool = False,
) -> Value:
    """Attention itself, from queries, keys and values with their positions to its output.

    Args:
        tape: Where to note.
        shape: The model's.
        rows: Of the micro-batch.
        q: ``(B, H, S, D)``.
        k: ``(B, K, S, D)``.
        v: As ``k``.
        is_float_mask: Whether the mask is one number for each pair already, not a boolean.
    """
    if kernel(shape, tape.setting) == "eager":
        return _eager(tape, shape, rows, q, k, v)
    return _fused(tape, shape, rows, q, k, v, is_float_mask)


def _repeated(tape: Tape, shape: ModelShape, rows: Rows, x: Value) -> Value:
    """Keys or values once for each query head."""
    if shape.num_kv_heads == shape.num_heads:
        return x
    return tape.new(rows.number * rows.keys * shape.queries_size, x.item, x.has_grad)


def _fused(
    tape: Tape, shape: ModelShape, rows: Rows, q: Value, k: Value, v: Value, is_float_mask: bool
) -> Value:
    if not (q.has_grad or k.has_grad or v.has_grad):
        return tape.new(rows.tokens * shape.queries_size, None, False)
    is_masked = has_mask(shape, tape.setting)
    if is_masked:
        k, v = _repeated(tape, shape, rows, k), _repeated(tape, shape, rows, v)
    out = tape.new(rows.tokens * shape.queries_size)
    sums = tape.new(rows.tokens * shape.num_heads, FLOAT)
    tape.keep(tape.cast(q), tape.cast(k), tape.cast(v), out, sums)
    if is_masked and not is_float_mask:  # the kernel makes numbers of booleans, in each layer
        heads = shape.num_heads if shape.is_t5 else 1  # with T5's biases of positions
        tape.keep(tape.new(heads * rows.number * rows.length * rows.keys))
    return out


def _eager(tape: Tape, shape: ModelShape, rows: Rows, q: Value, k: Value, v: Value) -> Value:
    if not (q.has_grad or k.has_grad or v.has_grad):
        return tape.new(rows.tokens * shape.queries_size, None, False)
    k, v = _repeated(tape, shape, rows, k), _repeated(tape, shape, rows, v)
    tape.keep(tape.cast(q), tape.cast(k))
    pairs = rows.number * shape.num_heads * rows.length * rows.keys
    if shape.fields.get("attn_logit_softcapping"):
        tape.keep(tape.new(pairs))  # tanh
    is_exact = shape.model_type not in ("gpt2", "falcon", "t5", "mt5")
    probabilities = tape.new(pairs, FLOAT if is_exact else None)
    tape.keep(probabilities)
    if probabilities.item != tape.item:
        probabilities = tape.new(pairs)
    probabilities = tape.dropout(probabilities, dropout_rate(shape))
    tape.keep(probabilities, tape.cast(v))
    return tape.new(rows.tokens * shape.queries_size)


def dropout_rate(shape: ModelShape) -> float:
    """The base's own dropout of probabilities."""
    names = ("attn_pdrop", "attention_dropout", "dropout_rate")
    return float(next((shape.fields[n] for n in names if shape.fields.get(n)), 0))
