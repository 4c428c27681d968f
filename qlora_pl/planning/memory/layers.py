"""One layer of each known family, as the operations that keep something for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

from qlora_pl.planning.memory.attention import Rows, attend
from qlora_pl.planning.memory.tape import Tape, Value
from qlora_pl.planning.shapes.layouts import LLAMA_LIKE, falcon_norms
from qlora_pl.planning.shapes.model_shape import ModelShape
from qlora_pl.planning.shapes.parameters import ParameterShape


class Block:
    """The matrices of a layer, by the ends of their names.

    Args:
        shape: The model's.
        stem: What the names begin with where there are two kinds of layers.
    """

    def __init__(self, shape: ModelShape, stem: str = "") -> None:
        self.shape = shape
        self.matrices: dict[str, ParameterShape] = {
            p.module.partition(".*.")[2]: p
            for p in shape.linears
            if p.layers and p.name.startswith(stem)
        }

    def __contains__(self, end: str) -> bool:
        return any(name.endswith(end) for name in self.matrices)

    def product(self, tape: Tape, end: str, x: Value) -> Value:
        """The product with the one matrix whose name ends so."""
        (matrix,) = (p for name, p in self.matrices.items() if name.endswith(end))
        return tape.linear(matrix, x)

    def norm(self, tape: Tape, x: Value, width: int | None = None) -> Value:
        """The family's norm."""
        width = self.shape.hidden_size if width is None else width
        if self.shape.is_t5:
            return tape.t5_norm(x, width)
        if self.shape.model_type in LLAMA_LIKE:
            return tape.rms_norm(x, width, self.shape.model_type.startswith("gemma"))
        return tape.layer_norm(x, width)

    def rate(self, name: str) -> float:
        """A dropout rate of the base's own."""
        return float(self.shape.fields.get(name) or 0)


Layer = Callable[[Tape, Block, Rows, Value], Value]


def run_layer(tape: Tape, shape: ModelShape, rows: Rows, x: Value) -> Value:
    """A decoder layer of the model's family; of an unknown one, what most have in common."""
    layer = _LAYERS.get(shape.model_type, _generic) if shape.is_known else _generic
    return layer(tape, Block(shape), rows, x)


def _sum(tape: Tape, x: Value, *others: Value) -> Value:
    """A residual sum, in the type of the stream."""
    return tape.new(x.size, x.item, x.has_grad or any(other.has_grad for other in others))


def _rotated(tape: Tape, x: Value, size: int | None = None) -> Value:
    """Turned by positions: sines and cosines are all layers' together; nothing else is kept."""
    item = max(x.item, tape.stream)
    return tape.new(x.size if size is None else size, item, x.has_grad)


def _llama(tape: Tape, block: Block, rows: Rows, x: Value) -> Value:
    shape = block.shape
    normed = block.norm(tape, x)
    is_fused = "qkv_proj" in block
    if is_fused:
        whole = block.product(tape, "qkv_proj", normed)
        q = _rotated(tape, whole, rows.tokens * shape.queries_size)
        k = _rotated(tape, whole, rows.tokens * shape.keys_size)
        v = whole  # a view
    else:
        q, k, v = (block.product(tape, f"{name}_proj", normed) for name in "qkv")
        if shape.model_type == "qwen3":
            q, k = (block.norm(tape, value, shape.head_size) for value in (q, k))
        q, k = _rotated(tape, q), _rotated(tape, k)
    attended = attend(tape, shape, rows, q, k, v, is_contiguous=is_fused)
    out = block.product(tape, "o_proj", attended)
    out = tape.dropout(out, block.rate("resid_pdrop"))
    if shape.model_type == "gemma2":
        out = block.norm(tape, out)
    x = _sum(tape, x, out)
    out = tape.dropout(
        _gated_mlp(tape, block, rows, block.norm(tape, x)), block.rate("resid_pdrop")
    )
    if shape.model_type == "gemma2":
        out = block.norm(tape, out)
    return _sum(tape, x, out)


def _gated_mlp(tape: Tape, block: Block, rows: Rows, x: Value) -> Value:
    kind = block.shape.activation
    if "gate_up_proj" in block:
        both = block.product(tape, "gate_up_proj", x)
        active = tape.new(rows.tokens * block.shape.mlp_size, both.item)
        tape.keep(both, active)  # both factors' sources are views of one product
        return block.product(tape, "down_proj", tape.like(active))
    gate, up = block.product(tape, "gate_proj", x), block.product(tape, "up_proj", x)
    return block.product(tape, "down_proj", tape.multiply(tape.activation(kind, gate), up))


def _plain_mlp(tape: Tape, block: Block, x: Value, first: str, second: str) -> Value:
    kind = "gelu" if block.shape.model_type == "bloom" else block.shape.activation
    return block.product(tape, second, tape.activation(kind, block.product(tape, first, x)))


def _gpt_neox(tape: Tape, block: Block, rows: Rows, x: Value) -> Value:
    shape, rate = block.shape, block.rate("hidden_dropout")
    whole = block.product(tape, "query_key_value", block.norm(tape, x))
    q, k = (_rotated(tape, whole, rows.tokens * shape.hidden_size) for _ in "qk")
    attended = attend(tape, shape, rows, q, k, whole, is_contiguous=True)
    out = tape.dropout(block.product(tape, "attention.dense", attended), rate)
    middle = x if shape.fields["use_parallel_residual"] else _sum(tape, x, out)
    inner = block.norm(tape, middle)
    out2 = tape.dropout(_plain_mlp(tape, block, inner, "dense_h_to_4h", "dense_4h_to_h"), rate)
    return _sum(tape, middle, out, out2)


def _bloom(tape: Tape, block: Block, rows: Rows, x: Value) -> Value:
    rate = block.rate("hidden_dropout")
    whole = block.product(tape, "query_key_value", block.norm(tape, x))
    attended = attend(tape, block.shape, rows, whole, whole, whole)
    x = _sum(tape, x, tape.dropout(block.product(tape, "self_attention.dense", attended), rate))
    inner = block.norm(tape, x)
    out = _plain_mlp(tape, block, inner, "dense_h_to_4h", "dense_4h_to_h")
    return _sum(tape, x, tape.dropout(out, rate))


def _falcon(tape: Tape, block: Block, rows: Rows, x: Value) -> Value:
    shape, norms = block.shape, falcon_norms(block.shape.fields)
    normed = block.norm(tape, x)
    whole = block.product(tape, "query_key_value", normed)
    q = k = v = whole
    heads = shape.num_kv_heads
    if shape.fields["new_decoder_architecture"]:
        heads = shape.num_heads  # keys and values are copied for every query head
    if not shape.fields["alibi"]:
        keys = rows.tokens * heads * shape.head_size
        q = _rotated(tape, whole, rows.tokens * shape.hidden_size)
        k = _rotated(tape, whole, keys)
        is_copied = shape.num_kv_heads < shape.num_heads
        v = tape.new(keys, whole.item, whole.has_grad) if is_copied else whole
    attended = attend(
        tape,
        shape,
        rows,
        q,
        k,
        v,
        num_kv_heads=heads,
        is_float_mask=bool(shape.fields["alibi"]),
    )
    out = block.product(tape, "self_attention.dense", attended)
    if "ln_mlp" in norms:
        normed = block.norm(tape, x)
    elif "post_attention_layernorm" in norms:
        x = _sum(tape, x, tape.dropout(out, block.rate("attention_dropout")))
        normed = block.norm(tape, x)
    out2 = _plain_mlp(tape, block, normed, "dense_h_to_4h", "dense_4h_to_h")
    return _sum(tape, x, out, tape.dropout(out2, block.rate("hidden_dropout")))


def _opt(tape: Tape, block: Block, rows: Rows, x: Value) -> Value:
    rate = block.rate("dropout")
    normed = block.norm(tape, x)
    q, k, v = (block.product(tape, f"{name}_proj", normed) for name in "qkv")
    attended = attend(tape, block.shape, rows, tape.like(q), k, v)  # q is scaled
    x = _sum(tape, x, tape.dropout(block.product(tape, "out_proj", attended), rate))
    out = _plain_mlp(tape, block, block.norm(tape, x), "fc1", "fc2")
    return _sum(tape, x, tape.dropout(out, rate))


def _gpt2(tape: Tape, block: Block, rows: Rows, x: Value) -> Value:
    rate = block.rate("resid_pdrop")
    whole = block.product(tape, "c_attn", block.norm(tape, x))
    attended = attend(tape, block.shape, rows, whole, whole, whole)
    x = _sum(tape, x, tape.dropout(block.product(tape, "attn.c_proj", attended), rate))
    out = _plain_mlp(tape, block, block.norm(tape, x), "c_fc", "mlp.c_proj")
    return _sum(tape, x, tape.dropout(out, rate))


def t5_layer(
    tape: Tape, shape: ModelShape, rows: Rows, x: Value, source: tuple[Rows, Value] | None
) -> Value:
    """A layer of T5's encoder, or of its decoder.

    Args:
        tape: Where to note.
        shape: The model's.
        rows: Of the side that the layer works on.
        x: The layer's input.
        source: The encoder's rows and output, for a layer of the decoder.
    """
    block = Block(shape, "encoder" if source is None else "decoder")
    rate = block.rate("dropout_rate")

    def attention(name: str, of: Rows, x: Value, keys_from: Value | None) -> Value:
        normed = block.norm(tape, x)
        given = normed if keys_from is None else keys_from
        q = block.product(tape, f"{name}.q", normed)
        k, v = (block.product(tape, f"{name}.{part}", given) for part in "kv")
        attended = attend(tape, shape, of, q, k, v, is_across=keys_from is not None)
        out = block.product(tape, f"{name}.o", attended)
        return _sum(tape, x, tape.dropout(out, rate))

    x = attention("SelfAttention", rows, x, None)
    if source is not None:
        cross = Rows(rows.number, rows.length, source[0].length)
        x = attention("EncDecAttention", cross, x, source[1])
    normed = block.norm(tape, x)
    if shape.is_gated:
        gate = tape.activation(shape.activation, block.product(tape, "wi_0", normed))
        inner = tape.multiply(gate, block.product(tape, "wi_1", normed))
    else:
        inner = tape.activation(shape.activation, block.product(tape, "wi", normed))
    out = block.product(tape, "wo", tape.dropout(inner, rate))
    return _sum(tape, x, tape.dropout(out, rate))


def _generic(tape: Tape, block: Block, rows: Rows, x: Value) -> Value:
    """What can be told of any layer: inputs and outputs of products, norms, one attention."""
    shape = block.shape
    given: dict[tuple[str, int], Value] = {}
    for parameter in shape.with_roles("norm"):
        if parameter.layers and parameter.size == shape.hidden_size:
            tape.rms_norm(tape.like(x), shape.hidden_size)
    for name, matrix in block.matrices.items():
        place = (name.rpartition(".")[0], matrix.inputs)
        if place not in given:
            given[place] = tape.new(rows.tokens * matrix.inputs, None, bool(given) or x.has_grad)
        out = tape.linear(matrix, given[place])
        if matrix.inputs == shape.hidden_size:  # those that lead back are only added
            tape.keep(out)
    if shape.is_gated:
        tape.keep(tape.new(rows.tokens * shape.mlp_size))
    tape.keep(tape.new(rows.tokens * shape.num_heads, 4))
    return tape.like(x)


def final_norm(tape: Tape, shape: ModelShape, x: Value) -> Value:
    """The norm after the last layer."""
    return Block(shape).norm(tape, x)


_LAYERS: dict[str, Layer] = {
    **dict.fromkeys(LLAMA_LIKE, _llama),
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "falcon": _falcon,
    "opt": _opt,
    "gpt2": _gpt2,
}
