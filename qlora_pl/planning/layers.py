"""One layer of each known family, as the operations that keep something for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_pl.planning.attention import Rows, attend
from qlora_pl.planning.families import LLAMA_LIKE, falcon_norms
from qlora_pl.planning.shapes import ModelShape
from qlora_pl.planning.tape import Tape, Value

Layer = Callable[[Tape, ModelShape, Rows, Value], Value]


def layer_of(shape: ModelShape) -> Layer:
    """The layer of a model's family; of an unknown one, what most have in common."""
    return _LAYERS.get(shape.model_type, _llama if shape.is_gated else _gpt_neox)


class _Names:
    """Names of a layer's modules by their last parts, of a known family or of another."""

    def __init__(self, shape: ModelShape) -> None:
        self.by_kind = {p.kind: p.module for p in shape.linears if p.layers}

    def __getitem__(self, kind: str) -> str:
        return self.by_kind.get(kind, kind)


def _product(tape: Tape, shape: ModelShape, names: Any, kind: str, x: Value) -> Value:
    matrix = next(p for p in shape.linears if p.module == names[kind])
    return tape.linear(matrix.module, x, matrix.inputs, matrix.outputs)


def _norm(tape: Tape, shape: ModelShape, x: Value, width: int | None = None) -> Value:
    width = shape.hidden_size if width is None else width
    if shape.model_type in LLAMA_LIKE:
        return tape.rms_norm(x, width, shape.model_type.startswith("gemma"))
    return tape.layer_norm(x, width)


def _rotated(tape: Tape, *values: Value) -> list[Value]:
    """By positions: sines and cosines are all layers' together, and nothing else is kept."""
    return [tape.like(value) for value in values]


def _llama(tape: Tape, shape: ModelShape, rows: Rows, x: Value) -> Value:
    names = _Names(shape)
    normed = _norm(tape, shape, x)
    if "qkv_proj" in names.by_kind:
        whole = _product(tape, shape, names, "qkv_proj", normed)
        q = tape.new(rows.tokens * shape.queries_size, None, whole.has_grad)
        k = tape.new(rows.tokens * shape.keys_size, None, whole.has_grad)
        v = whole  # a view
    else:
        q, k, v = (_product(tape, shape, names, f"{name}_proj", normed) for name in "qkv")
        if shape.model_type == "qwen3":
            q, k = (_norm(tape, shape, value, shape.head_size) for value in (q, k))
        q, k = _rotated(tape, q, k)
    out = _product(tape, shape, names, "o_proj", attend(tape, shape, rows, q, k, v, False))
    if shape.model_type == "gemma2":
        out = _norm(tape, shape, out)
    x = tape.like(x, out)
    normed = _norm(tape, shape, x)
    if "gate_up_proj" in names.by_kind:
        both = _product(tape, shape, names, "gate_up_proj", normed)
        tape.keep(both)  # gate and up are views
        active = tape.new(rows.tokens * shape.mlp_size)
        tape.keep(active)
        inner = tape.like(active)
    else:
        gate = _product(tape, shape, names, "gate_proj", normed)
        up = _product(tape, shape, names, "up_proj", normed)
        inner = tape.multiply(tape.activation(shape.activation, gate), up)
    out = _product(tape, shape, names, "down_proj", inner)
    if shape.model_type == "gemma2":
        out = _norm(tape, shape, out)
    return tape.like(x, out)


def _gpt_neox(tape: Tape, shape: ModelShape, rows: Rows, x: Value) -> Value:
    names = _Names(shape)
    rate = float(shape.fields.get("hidden_dropout") or 0)
    whole = _product(tape, shape, names, "query_key_value", _norm(tape, shape, x))
    q, k = (tape.new(rows.tokens * shape.hidden_size, None, whole.has_grad) for _ in "qk")
    attended = attend(tape, shape, rows, q, k, whole, False)
    out = tape.dropout(_product(tape, shape, names, "dense", attended), rate)
    middle = x if shape.fields.get("use_parallel_residual", True) else tape.like(x, out)
    inner = _product(tape, shape, names, "dense_h_to_4h", _norm(tape, shape, middle))
    inner = tape.activation(shape.activation, inner)
    out2 = tape.dropout(_product(tape, shape, names, "dense_4h_to_h", inner), rate)
    return tape.like(x, out, out2)


def _bloom(tape: Tape, shape: ModelShape, rows: Rows, x: Value) -> Value:
    names = _Names(shape)
    rate = float(shape.fields.get("hidden_dropout") or 0)
    whole = _product(tape, shape, names, "query_key_value", _norm(tape, shape, x))
    attended = attend(tape, shape, rows, whole, whole, whole, True)
    out = tape.dropout(_product(tape, shape, names, "dense", attended), rate)
    x = tape.like(x, out)
    inner = _product(tape, shape, names, "dense_h_to_4h", _norm(tape, shape, x))
    inner = tape.activation("gelu", inner)
    out = tape.dropout(_product(tape, shape, names, "dense_4h_to_h", inner), rate)
    return tape.like(x, out)


def _falcon(tape: Tape, shape: ModelShape, rows: Rows, x: Value) -> Value:
    names, norms = _Names(shape), falcon_norms(shape.fields)
    normed = _norm(tape, shape, x)
    whole = _product(tape, shape, names, "query_key_value", normed)
    q = k = v = whole
    is_alibi = bool(shape.fields.get("alibi"))
    if not is_alibi:
        keys = rows.tokens * shape.keys_size
        q = tape.new(rows.tokens * shape.hidden_size, None, whole.has_grad)
        k = tape.new(keys, None, whole.has_grad)
        v = tape.new(keys, None, whole.has_grad) if shape.num_kv_heads < shape.num_heads else whole
    attended = attend(tape, shape, rows, q, k, v, is_alibi)
    out = _product(tape, shape, names, "dense", attended)
    if "ln_mlp" in norms:
        normed = _norm(tape, shape, x)
    elif "post_attention_layernorm" in norms:
        x = tape.like(x, out)
        normed = _norm(tape, shape, x)
    inner = _product(tape, shape, names, "dense_h_to_4h", normed)
    inner = tape.activation(shape.activation, inner)
    out2 = _product(tape, shape, names, "dense_4h_to_h", inner)
    return tape.like(x, out, out2)


def _opt(tape: Tape, shape: ModelShape, rows: Rows, x: Value) -> Value:
    names, rate = _Names(shape), float(shape.fields["dropout"])
    normed = _norm(tape, shape, x)
    q, k, v = (_product(tape, shape, names, f"{name}_proj", normed) for name in "qkv")
    q = tape.like(q)  # scaled
    out = _product(tape, shape, names, "out_proj", attend(tape, shape, rows, q, k, v, False))
    x = tape.like(x, tape.dropout(out, rate))
    inner = _product(tape, shape, names, "fc1", _norm(tape, shape, x))
    inner = tape.activation(shape.activation, inner)
    out = _product(tape, shape, names, "fc2", inner)
    return tape.like(x, tape.dropout(out, rate))


def _gpt2(tape: Tape, shape: ModelShape, rows: Rows, x: Value) -> Value:
    by_name = {p.module.rpartition(".*.")[2]: p for p in shape.linears}
    rate = float(shape.fields["resid_pdrop"])

    def product(name: str, value: Value) -> Value:
        matrix = by_name[name]
        return tape.linear(matrix.module, value, matrix.inputs, matrix.outputs)

    whole = product("attn.c_attn", _norm(tape, shape, x))
    attended = attend(tape, shape, rows, whole, whole, whole, False)
    x = tape.like(x, tape.dropout(product("attn.c_proj", attended), rate))
    inner = tape.activation(shape.activation, product("mlp.c_fc", _norm(tape, shape, x)))
    return tape.like(x, tape.dropout(product("mlp.c_proj", inner), rate))


_LAYERS: dict[str, Layer] = {
    **dict.fromkeys(LLAMA_LIKE, _llama),
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "falcon": _falcon,
    "opt": _opt,
    "gpt2": _gpt2,
}


def final_norm(tape: Tape, shape: ModelShape, x: Value) -> Value:
    """The norm after the last layer."""
    return _norm(tape, shape, x)
