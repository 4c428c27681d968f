"""Every parameter of a model of a known family, in transformers' names and order.

What a family has in common with another is written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_pl.planning.shapes.parameters import ParameterList, ParameterShape

Fields = dict[str, Any]

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")


def llama_like(fields: Fields) -> list[ParameterShape]:
    """LLaMA's kin: Mistral, Qwen, Gemma, Phi-3."""
    hidden, head = fields["hidden_size"], fields["head_dim"]
    queries = fields["num_attention_heads"] * head
    keys = fields["num_key_value_heads"] * head
    mlp, kind = fields["intermediate_size"], fields["model_type"]
    is_biased = bool(fields["attention_bias"])
    parts = ParameterList(fields["num_hidden_layers"])
    layer = "model.layers.*"
    parts.add("model.embed_tokens.weight", (fields["vocab_size"], hidden), "embedding")
    if kind == "phi3":
        parts.linear(f"{layer}.self_attn.o_proj", queries, hidden)
        parts.linear(f"{layer}.self_attn.qkv_proj", hidden, queries + 2 * keys)
    else:
        for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            parts.linear(
                f"{layer}.self_attn.{name}",
                hidden,
                outputs,
                has_bias=is_biased or kind == "qwen2",
            )
        parts.linear(f"{layer}.self_attn.o_proj", queries, hidden, has_bias=is_biased)
    if kind == "qwen3":
        parts.norm(f"{layer}.self_attn.q_norm", head)
        parts.norm(f"{layer}.self_attn.k_norm", head)
    if kind == "phi3":
        parts.linear(f"{layer}.mlp.gate_up_proj", hidden, 2 * mlp)
    else:
        for name in ("gate_proj", "up_proj"):
            parts.linear(f"{layer}.mlp.{name}", hidden, mlp, has_bias=bool(fields["mlp_bias"]))
    parts.linear(f"{layer}.mlp.down_proj", mlp, hidden, has_bias=bool(fields["mlp_bias"]))
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in norms:
        parts.norm(f"{layer}.{name}", hidden)
    parts.norm("model.norm", hidden)
    return _with_head(parts, fields)


def _with_head(
    parts: ParameterList, fields: Fields, name: str = "lm_head", inputs: int | None = None
) -> list[ParameterShape]:
    if not fields["tie_word_embeddings"]:
        width = fields["hidden_size"] if inputs is None else inputs
        parts.add(f"{name}.weight", (fields["vocab_size"], width), "head")
    return parts.parameters


def gpt_neox(fields: Fields) -> list[ParameterShape]:
    """GPT-NeoX and Pythia."""
    hidden, mlp = fields["hidden_size"], fields["intermediate_size"]
    parts = ParameterList(fields["num_hidden_layers"])
    layer = "gpt_neox.layers.*"
    is_biased = bool(fields["attention_bias"])
    parts.add("gpt_neox.embed_in.weight", (fields["vocab_size"], hidden), "embedding")
    for name in ("input_layernorm", "post_attention_layernorm"):
        parts.norm(f"{layer}.{name}", hidden, has_bias=True)
    parts.linear(f"{layer}.attention.query_key_value", hidden, 3 * hidden, has_bias=is_biased)
    parts.linear(f"{layer}.attention.dense", hidden, hidden, has_bias=is_biased)
    parts.linear(f"{layer}.mlp.dense_h_to_4h", hidden, mlp, has_bias=True)
    parts.linear(f"{layer}.mlp.dense_4h_to_h", mlp, hidden, has_bias=True)
    parts.norm("gpt_neox.final_layer_norm", hidden, has_bias=True)
    return _with_head(parts, fields)


def bloom(fields: Fields) -> list[ParameterShape]:
    """BLOOM."""
    hidden = fields["hidden_size"]
    parts = ParameterList(fields["num_hidden_layers"])
    layer = "transformer.h.*"
    parts.add("transformer.word_embeddings.weight", (fields["vocab_size"], hidden), "embedding")
    parts.norm("transformer.word_embeddings_layernorm", hidden, has_bias=True)
    parts.norm(f"{layer}.input_layernorm", hidden, has_bias=True)
    parts.linear(f"{layer}.self_attention.query_key_value", hidden, 3 * hidden, has_bias=True)
    parts.linear(f"{layer}.self_attention.dense", hidden, hidden, has_bias=True)
    parts.norm(f"{layer}.post_attention_layernorm", hidden, has_bias=True)
    parts.linear(f"{layer}.mlp.dense_h_to_4h", hidden, 4 * hidden, has_bias=True)
    parts.linear(f"{layer}.mlp.dense_4h_to_h", 4 * hidden, hidden, has_bias=True)
    parts.norm("transformer.ln_f", hidden, has_bias=True)
    return _with_head(parts, fields)


def falcon(fields: Fields) -> list[ParameterShape]:
    """Falcon's three generations."""
    hidden, mlp = fields["hidden_size"], fields["intermediate_size"]
    head = fields["head_dim"]
    parts = ParameterList(fields["num_hidden_layers"])
    layer, is_biased = "transformer.h.*", bool(fields["bias"])
    parts.add("transformer.word_embeddings.weight", (fields["vocab_size"], hidden), "embedding")
    outputs = hidden + 2 * fields["num_key_value_heads"] * head
    parts.linear(f"{layer}.self_attention.query_key_value", hidden, outputs, has_bias=is_biased)
    parts.linear(f"{layer}.self_attention.dense", hidden, hidden, has_bias=is_biased)
    parts.linear(f"{layer}.mlp.dense_h_to_4h", hidden, mlp, has_bias=is_biased)
    parts.linear(f"{layer}.mlp.dense_4h_to_h", mlp, hidden, has_bias=is_biased)
    for name in falcon_norms(fields):
        parts.norm(f"{layer}.{name}", hidden, has_bias=True)
    parts.norm("transformer.ln_f", hidden, has_bias=True)
    return _with_head(parts, fields)


def falcon_norms(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The norms of a layer: Falcon has had three kinds of layers."""
    num_norms = fields["num_ln_in_parallel_attn"]
    if fields["new_decoder_architecture"] and num_norms in (None, 2):
        return ("ln_attn", "ln_mlp")
    if fields["parallel_attn"]:
        return ("input_layernorm",)
    return ("input_layernorm", "post_attention_layernorm")


def opt(fields: Fields) -> list[ParameterShape]:
    """OPT."""
    hidden, mlp = fields["hidden_size"], fields["intermediate_size"]
    projected = fields["word_embed_proj_dim"]
    parts = ParameterList(fields["num_hidden_layers"])
    stem, layer, is_biased = "model.decoder", "model.decoder.layers.*", bool(fields["enable_bias"])
    parts.add(f"{stem}.embed_tokens.weight", (fields["vocab_size"], projected), "embedding")
    positions = fields["max_position_embeddings"] + 2  # the first two are never used
    parts.add(f"{stem}.embed_positions.weight", (positions, hidden), "embedding")
    if projected != hidden:
        parts.linear(f"{stem}.project_out", hidden, projected)
        parts.linear(f"{stem}.project_in", projected, hidden)
    has_norms = bool(fields["layer_norm_elementwise_affine"])
    if has_norms and fields["do_layer_norm_before"] and not fields["_remove_final_layer_norm"]:
        parts.norm(f"{stem}.final_layer_norm", hidden, has_bias=True)
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        parts.linear(f"{layer}.self_attn.{name}", hidden, hidden, has_bias=is_biased)
    if has_norms:
        parts.norm(f"{layer}.self_attn_layer_norm", hidden, has_bias=True)
    parts.linear(f"{layer}.fc1", hidden, mlp, has_bias=is_biased)
    parts.linear(f"{layer}.fc2", mlp, hidden, has_bias=is_biased)
    if has_norms:
        parts.norm(f"{layer}.final_layer_norm", hidden, has_bias=True)
    return _with_head(parts, fields, inputs=projected)


def gpt2(fields: Fields) -> list[ParameterShape]:
    """GPT-2, whose matrices lie transposed."""
    hidden, mlp = fields["hidden_size"], fields["intermediate_size"]
    parts = ParameterList(fields["num_hidden_layers"])
    layer = "transformer.h.*"
    parts.add("transformer.wte.weight", (fields["vocab_size"], hidden), "embedding")
    positions = fields["max_position_embeddings"]
    parts.add("transformer.wpe.weight", (positions, hidden), "embedding")
    parts.norm(f"{layer}.ln_1", hidden, has_bias=True)
    sizes = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden)}
    for name, (inputs, outputs) in sizes.items():
        parts.linear(f"{layer}.{name}", inputs, outputs, has_bias=True, is_transposed=True)
    parts.norm(f"{layer}.ln_2", hidden, has_bias=True)
    sizes = {"mlp.c_fc": (hidden, mlp), "mlp.c_proj": (mlp, hidden)}
    for name, (inputs, outputs) in sizes.items():
        parts.linear(f"{layer}.{name}", inputs, outputs, has_bias=True, is_transposed=True)
    parts.norm("transformer.ln_f", hidden, has_bias=True)
    return _with_head(parts, fields)


def t5(fields: Fields) -> list[ParameterShape]:
    """T5, T5 v1.1 and mT5: an encoder and a decoder."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    parts = ParameterList(0)
    parts.add("shared.weight", (fields["vocab_size"], hidden), "embedding")
    buckets = fields["relative_attention_num_buckets"]
    for stack, layers, is_decoder in (
        ("encoder", range(fields["num_hidden_layers"]), False),
        ("decoder", range(fields["num_decoder_layers"]), True),
    ):
        its = tuple(layers)
        block = f"{stack}.block.*.layer"
        _t5_attention(parts, f"{block}.0.SelfAttention", fields, its)
        parts.add(
            f"{block}.0.SelfAttention.relative_attention_bias.weight",
            (buckets, heads),
            "embedding",
            layers=its[:1],
        )
        parts.norm(f"{block}.0.layer_norm", hidden, layers=its)
        if is_decoder:
            _t5_attention(parts, f"{block}.1.EncDecAttention", fields, its)
            parts.norm(f"{block}.1.layer_norm", hidden, layers=its)
        last, mlp = f"{block}.{2 if is_decoder else 1}", fields["intermediate_size"]
        for name in ("wi_0", "wi_1") if is_gated(fields) else ("wi",):
            parts.linear(f"{last}.DenseReluDense.{name}", hidden, mlp, layers=its)
        parts.linear(f"{last}.DenseReluDense.wo", mlp, hidden, layers=its, is_fragile=True)
        parts.norm(f"{last}.layer_norm", hidden, layers=its)
        parts.norm(f"{stack}.final_layer_norm", hidden)
    return _with_head(parts, fields)


def _t5_attention(
    parts: ParameterList, module: str, fields: Fields, layers: tuple[int, ...]
) -> None:
    hidden, inner = fields["hidden_size"], fields["num_attention_heads"] * fields["head_dim"]
    for name in ("q", "k", "v"):
        parts.linear(f"{module}.{name}", hidden, inner, layers=layers)
    parts.linear(f"{module}.o", inner, hidden, layers=layers)


def is_gated(fields: Mapping[str, Any]) -> bool:
    """Whether the MLP multiplies two products, as T5 v1.1 and all of LLaMA's kin do."""
    if "feed_forward_proj" in fields:
        return str(fields["feed_forward_proj"]).startswith("gated")
    return fields["model_type"] in LLAMA_LIKE
