"""Tiny models and settings whose memory is counted: every term of the plan is in one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_pl.planning.memory.memory_plan import TrainingSetting

LLAMA_LIKE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
SIZES = {name: LLAMA_LIKE[name] for name in ("vocab_size", "hidden_size")}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE | {"model_type": "llama"},
    "mistral": LLAMA_LIKE | {"model_type": "mistral", "num_key_value_heads": 2},
    "qwen2": LLAMA_LIKE | {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": LLAMA_LIKE | {"model_type": "qwen3", "num_key_value_heads": 4},
    "gemma": LLAMA_LIKE | {"model_type": "gemma", "num_key_value_heads": 1},
    "gemma2": LLAMA_LIKE
    | {"model_type": "gemma2", "num_key_value_heads": 4, "query_pre_attn_scalar": 32},
    "phi3": {key: value for key, value in LLAMA_LIKE.items() if key != "head_dim"}
    | {"model_type": "phi3", "pad_token_id": 0},
    "gpt_neox": SIZES
    | {
        "model_type": "gpt_neox",
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "rotary_pct": 0.25,
    },
    "bloom": SIZES | {"model_type": "bloom", "n_layer": 4, "n_head": 8},
    "falcon": SIZES | {"model_type": "falcon", "num_hidden_layers": 4, "num_attention_heads": 8},
    "falcon-rw": SIZES
    | {
        "model_type": "falcon",
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "opt": SIZES
    | {
        "model_type": "opt",
        "word_embed_proj_dim": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "ffn_dim": 1024,
        "max_position_embeddings": 1024,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 512,
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 8,
        "n_positions": 1024,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": 512,
        "d_model": 256,
        "d_kv": 32,
        "d_ff": 704,
        "num_layers": 3,
        "num_heads": 8,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "dropout_rate": 0.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and one setting."""

    model: str
    setting: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the model's fields."""

    @property
    def name(self) -> str:
        """In words."""
        own = [f"{key} {value}" for key, value in (self.changes | self.setting).items()]
        return ", ".join([self.model, *own])

    @property
    def fields(self) -> dict[str, Any]:
        """The config.json."""
        return MODELS[self.model] | self.changes

    @property
    def training(self) -> TrainingSetting:
        """The setting, of a run on a CPU."""
        return TrainingSetting(**DEFAULTS | self.setting)


DEFAULTS: dict[str, Any] = {
    "r": 16,
    "batch_size": 2,
    "tokens_per_row": 128,
    "has_mask": False,
    "gradient_checkpointing": False,
    "device": "cpu",
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CASES = [
    Case(model="llama"),
    Case(model="llama", setting={"adapter_dtype": "bfloat16"}),
    Case(model="llama", setting={"dropout": 0.1}),
    Case(model="llama", setting={"adapter_dtype": "bfloat16", "dropout": 0.1}),
    Case(model="llama", setting={"has_mask": True}),
    Case(model="llama", setting={"attention": "eager"}),
    Case(model="llama", setting={"attention": "eager", "has_mask": True, "dropout": 0.05}),
    Case(model="llama", setting={"gradient_checkpointing": True}),
    Case(model="llama", setting={"gradient_checkpointing": True, "has_mask": True, "dropout": 0.1}),
    Case(model="llama", setting={"quant_type": "none"}),
    Case(model="llama", setting={"quant_type": "int8"}),
    Case(model="llama", setting={"quant_type": "fp4", "double_quant": False}),
    Case(model="llama", setting={"compute_dtype": "float32"}),
    Case(model="llama", setting={"compute_dtype": "float16"}),
    Case(model="llama", setting={"is_packed": True}),
    Case(model="llama", setting={"method": "dora"}),
    Case(
        model="llama", setting={"quant_type": "none", "method": "none", "adapter_dtype": "bfloat16"}
    ),
    Case(model="llama", setting={"quant_type": "none", "method": "none"}),
    Case(model="llama", setting={"target_modules": ("q_proj", "v_proj")}),
    Case(model="llama", setting={"tokens_per_row": 640}),
    Case(model="mistral"),
    Case(model="mistral", setting={"has_mask": True, "adapter_dtype": "bfloat16"}),
    Case(model="mistral", setting={"attention": "eager", "dropout": 0.1}),
    Case(model="qwen2", setting={"has_mask": True}),
    Case(model="qwen3", setting={"dropout": 0.05, "has_mask": True}),
    Case(model="gemma", setting={"has_mask": True}),
    Case(model="gemma2"),
    Case(model="phi3"),
    Case(model="gpt_neox"),
    Case(model="gpt_neox", setting={"dropout": 0.05, "adapter_dtype": "bfloat16"}),
    Case(model="gpt_neox", setting={"attention": "eager", "has_mask": True}),
    Case(model="gpt_neox", setting={"gradient_checkpointing": True}),
    Case(model="bloom"),
    Case(model="bloom", setting={"dropout": 0.1, "adapter_dtype": "bfloat16"}),
    Case(model="bloom", setting={"gradient_checkpointing": True}),
    Case(model="falcon"),
    Case(model="falcon-rw", setting={"has_mask": True}),
    Case(model="opt", changes={"dropout": 0.0}),
    Case(model="opt"),
    Case(model="gpt2", changes=NO_DROPOUT),
    Case(model="gpt2", changes=NO_DROPOUT, setting={"attention": "eager", "dropout": 0.1}),
    Case(model="gemma", setting={"has_mask": True, "attention": "eager"}),
    Case(model="gpt2", changes=NO_DROPOUT, setting={"gradient_checkpointing": True}),
    Case(model="llama", setting={"attention": "eager", "gradient_checkpointing": True}),
    Case(model="llama", setting={"compute_dtype": "float16", "gradient_checkpointing": True}),
    Case(model="t5", setting={"has_mask": True}),
    Case(model="t5", setting={"has_mask": True, "gradient_checkpointing": True}),
    Case(model="t5", setting={"attention": "eager", "has_mask": True, "dropout": 0.05}),
    Case(model="llama", setting={"method": "dora", "dropout": 0.1}),
    Case(
        model="llama", setting={"quant_type": "none", "method": "none", "compute_dtype": "float16"}
    ),
]
