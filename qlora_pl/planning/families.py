"""From the fields of a config.json to every parameter of the model, for the known families.

Names and sizes are transformers' own; no library is imported, so that a plan takes a second. What a
family has in common with another is written once, in the order of its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_pl.planning.parameters import ParameterList, ParameterShape

Fields = dict[str, Any]

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family's config.json says in which words, and what it leaves to its defaults."""

    parameters: Callable[[Fields], list[ParameterShape]]
    other_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """A field's other names, older or the family's own."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of fields that a config.json may leave out; a text names a field whose value is taken, or
    'n x field' for a multiple of it."""


def _llama_like(fields: Fields) -> list[ParameterShape]:
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


def _gpt_neox(fields: Fields) -> list[ParameterShape]:
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


def _bloom(fields: Fields) -> list[ParameterShape]:
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


def _falcon(fields: Fields) -> list[ParameterShape]:
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


def _opt(fields: Fields) -> list[ParameterShape]:
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


def _gpt2(fields: Fields) -> list[ParameterShape]:
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


def _t5(fields: Fields) -> list[ParameterShape]:
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


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
_LLAMA = {
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "hidden_size / num_attention_heads",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": None,
}
_GEMMA = _LLAMA | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_T5 = Family(
    parameters=_t5,
    other_names={
        "hidden_size": ("d_model",),
        "num_hidden_layers": ("num_layers",),
        "num_attention_heads": ("num_heads",),
        "intermediate_size": ("d_ff",),
        "head_dim": ("d_kv",),
    },
    defaults={
        "num_decoder_layers": "num_hidden_layers",
        "num_key_value_heads": "num_attention_heads",
        "head_dim": 64,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "relu",
        "dropout_rate": 0.1,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "max_position_embeddings": None,
    },
)
FAMILIES: dict[str, Family] = {
    "llama": Family(parameters=_llama_like, defaults=_LLAMA),
    "mistral": Family(parameters=_llama_like, defaults=_LLAMA | {"num_key_value_heads": 8}),
    "qwen2": Family(parameters=_llama_like, defaults=_LLAMA),
    "qwen3": Family(parameters=_llama_like, defaults=_LLAMA | {"head_dim": 128}),
    "gemma": Family(parameters=_llama_like, defaults=_GEMMA | {"head_dim": 256}),
    "gemma2": Family(
        parameters=_llama_like,
        other_names={"hidden_act": ("hidden_activation",)},
        defaults=_GEMMA
        | {
            "head_dim": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi3": Family(
        parameters=_llama_like, defaults=_LLAMA | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    ),
    "gpt_neox": Family(
        parameters=_gpt_neox,
        defaults={
            "num_key_value_heads": "num_attention_heads",
            "head_dim": "hidden_size / num_attention_heads",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "max_position_embeddings": None,
        },
    ),
    "bloom": Family(
        parameters=_bloom,
        other_names={
            "hidden_size": ("n_embed",),
            "num_hidden_layers": ("n_layer",),
            "num_attention_heads": ("n_head",),
        },
        defaults={
            "intermediate_size": "4 x hidden_size",
            "num_key_value_heads": "num_attention_heads",
            "head_dim": "hidden_size / num_attention_heads",
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "apply_residual_connection_post_layernorm": False,
            "tie_word_embeddings": True,
            "max_position_embeddings": None,
        },
    ),
    "falcon": Family(
        parameters=_falcon,
        other_names={
            "hidden_size": ("n_embed",),
            "num_hidden_layers": ("n_layer",),
            "num_attention_heads": ("n_head",),
            "intermediate_size": ("ffn_hidden_size",),
            "num_kv_heads": ("n_head_kv",),
        },
        defaults={
            "intermediate_size": "4 x hidden_size",
            "head_dim": "hidden_size / num_attention_heads",
            "num_kv_heads": "num_attention_heads",
            "alibi": False,
            "bias": False,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "num_ln_in_parallel_attn": None,
            "activation": "gelu",
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "max_position_embeddings": None,
        },
    ),
    "opt": Family(
        parameters=_opt,
        other_names={"intermediate_size": ("ffn_dim",), "hidden_act": ("activation_function",)},
        defaults={
            "num_key_value_heads": "num_attention_heads",
            "head_dim": "hidden_size / num_attention_heads",
            "word_embed_proj_dim": "hidden_size",
            "max_position_embeddings": 2048,
            "hidden_act": "relu",
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": Family(
        parameters=_gpt2,
        other_names={
            "hidden_size": ("n_embd",),
            "num_hidden_layers": ("n_layer",),
            "num_attention_heads": ("n_head",),
            "intermediate_size": ("n_inner",),
            "max_position_embeddings": ("n_positions",),
            "hidden_act": ("activation_function",),
        },
        defaults={
            "intermediate_size": "4 x hidden_size",
            "num_key_value_heads": "num_attention_heads",
            "head_dim": "hidden_size / num_attention_heads",
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    "t5": _T5,
    "mt5": _T5,
}
