"""What the config.json of a known family says in which words, and what it may leave out.

The defaults are transformers' own; no library is imported, so that a plan takes a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_pl.planning.shapes import layouts
from qlora_pl.planning.shapes.layouts import Fields
from qlora_pl.planning.shapes.parameters import ParameterShape

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


_LLAMA = {
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "hidden_size / num_attention_heads",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
_MISTRAL = _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN = _LLAMA | {"max_position_embeddings": 32768}
_GEMMA = _LLAMA | {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
_T5 = Family(
    parameters=layouts.t5,
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
    "llama": Family(parameters=layouts.llama_like, defaults=_LLAMA),
    "mistral": Family(parameters=layouts.llama_like, defaults=_MISTRAL),
    "qwen2": Family(parameters=layouts.llama_like, defaults=_QWEN),
    "qwen3": Family(parameters=layouts.llama_like, defaults=_QWEN | {"head_dim": 128}),
    "gemma": Family(parameters=layouts.llama_like, defaults=_GEMMA),
    "gemma2": Family(
        parameters=layouts.llama_like,
        other_names={"hidden_act": ("hidden_activation",)},
        defaults=_GEMMA
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi3": Family(
        parameters=layouts.llama_like,
        defaults=_LLAMA | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "max_position_embeddings": 4096},
    ),
    "gpt_neox": Family(
        parameters=layouts.gpt_neox,
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
            "max_position_embeddings": 2048,
        },
    ),
    "bloom": Family(
        parameters=layouts.bloom,
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
        parameters=layouts.falcon,
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
            "max_position_embeddings": 2048,
        },
    ),
    "opt": Family(
        parameters=layouts.opt,
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
        parameters=layouts.gpt2,
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
