"""Random tiny models of every supported family, with the names their linears must have.

Shapes keep what is peculiar to a family (grouped heads, fused projections, biases, a tied head) and
nothing else; every width is a multiple of 64, and the base's own dropout (OPT, GPT-2) is off.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import CHAT_TEMPLATE, save_t5_tokenizer, save_tokenizer

VOCABULARY = 512
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = COMMON | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Family:
    """One row of the table in docs/models.md."""

    name: str
    model_type: str
    """transformers' name of its configuration."""
    settings: dict[str, Any]
    linears: tuple[str, ...]
    """Last parts of the names of what is quantised and adapted, in one layer."""
    num_linears: int
    """In the tiny model of two layers."""
    note: str = ""
    has_biases: bool = False
    kept_linears: tuple[str, ...] = ()
    """Last parts of the names of linears that are adapted but never quantised."""
    num_kept_linears: int = 0
    is_encoder_decoder: bool = False

    def save(self, folder: Path, seed: int = 0, **changes: Any) -> Path:
        """Save a random tiny model in bfloat16 with a tokenizer."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        torch.manual_seed(seed)
        settings = self.settings | changes
        config = AutoConfig.for_model(self.model_type, **settings)
        kind = AutoModelForSeq2SeqLM if self.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(config).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start at zero, where a lost one would not show
                torch.nn.init.normal_(parameter, std=0.1)
        if not self.is_encoder_decoder:
            model.save_pretrained(folder)
            save_tokenizer(folder, adds_bos=True, chat_template=CHAT_TEMPLATE)
            return folder
        if not settings.get("tie_word_embeddings", True):
            _untie(model)
        model.save_pretrained(folder)
        if not settings.get("tie_word_embeddings", True):  # as published files say it
            path = folder / "config.json"
            path.write_text(
                json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False})
            )
        save_t5_tokenizer(folder)
        return folder


def _untie(model: Any) -> None:
    """Transformers ties every T5's head; only a checkpoint that brings another one has its own."""
    head = torch.randn(model.lm_head.weight.shape) * 0.3
    model.lm_head.weight = torch.nn.Parameter(head.to(torch.bfloat16))
    model.all_tied_weights_keys.pop("lm_head.weight")


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
BLOOM_LIKE = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
FALCON = COMMON | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
FAMILIES = [
    Family("LLaMA", "llama", LLAMA_LIKE, (*ATTENTION, *GATED), 14),
    Family("Mistral", "mistral", LLAMA_LIKE, (*ATTENTION, *GATED), 14),
    Family("Qwen2", "qwen2", LLAMA_LIKE, (*ATTENTION, *GATED), 14, has_biases=True),
    Family("Qwen3", "qwen3", LLAMA_LIKE, (*ATTENTION, *GATED), 14),
    Family("Gemma", "gemma", LLAMA_LIKE, (*ATTENTION, *GATED), 14, "tied head"),
    Family(
        "Gemma 2",
        "gemma2",
        LLAMA_LIKE | {"query_pre_attn_scalar": 16},
        (*ATTENTION, *GATED),
        14,
        "tied head, logits capped",
    ),
    Family(
        "Phi-3",
        "phi3",
        LLAMA_LIKE,
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        8,
    ),
    Family(
        "BLOOM",
        "bloom",
        COMMON | {"hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
        BLOOM_LIKE,
        8,
        "tied head",
        has_biases=True,
    ),
    Family(
        "Falcon (rotary)",
        "falcon",
        FALCON,
        BLOOM_LIKE,
        8,
        "transformers alone leaves it in 16 bits; tied head",
    ),
    Family(
        "Falcon RW",
        "falcon",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        BLOOM_LIKE,
        8,
        "transformers alone leaves it in 16 bits; tied head",
        has_biases=True,
    ),
    Family(
        "GPT-NeoX, Pythia",
        "gpt_neox",
        COMMON
        | {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
        },
        BLOOM_LIKE,
        8,
        has_biases=True,
    ),
    Family(
        "OPT",
        "opt",
        COMMON
        | {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "init_std": 0.1,
            "dropout": 0.0,
        },
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        12,
        "tied head",
        has_biases=True,
    ),
    Family(
        "GPT-2",
        "gpt2",
        COMMON
        | {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.1,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        ("c_attn", "c_proj", "c_fc"),
        8,
        "its Conv1D matrices are packed transposed; tied head",
        has_biases=True,
    ),
    Family(
        "Phi-1, Phi-2",
        "phi",
        LLAMA_LIKE | {"num_key_value_heads": 4},
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        12,
        has_biases=True,
    ),
    Family(
        "StableLM",
        "stablelm",
        LLAMA_LIKE,
        (*ATTENTION, *GATED),
        14,
    ),
]
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
GATED_T5 = T5 | {"feed_forward_proj": "gated-gelu"}
UNTIED_T5 = GATED_T5 | {"tie_word_embeddings": False}
T5_ATTENTION = ("q", "k", "v", "o")
FAMILIES += [
    Family(
        "T5",
        "t5",
        T5,
        (*T5_ATTENTION, "wi"),
        28,
        "`wo` adapted, in 16 bits; tied head",
        kept_linears=("wo",),
        num_kept_linears=4,
        is_encoder_decoder=True,
    ),
    Family(
        "T5 v1.1, Flan-T5",
        "t5",
        UNTIED_T5,
        (*T5_ATTENTION, "wi_0", "wi_1"),
        32,
        "`wo` adapted, in 16 bits",
        kept_linears=("wo",),
        num_kept_linears=4,
        is_encoder_decoder=True,
    ),
    Family(
        "mT5",
        "mt5",
        UNTIED_T5,
        (*T5_ATTENTION, "wi_0", "wi_1"),
        32,
        "`wo` adapted, in 16 bits",
        kept_linears=("wo",),
        num_kept_linears=4,
        is_encoder_decoder=True,
    ),
]
CAUSAL_FAMILIES = [family for family in FAMILIES if not family.is_encoder_decoder]
BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
Saver = Callable[[str], Path]
