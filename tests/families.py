"""Random tiny models of every supported family, with the names their linears must have.

Shapes keep what is peculiar to a family (grouped heads, fused projections, biases, a tied head) and
nothing else; every width is a multiple of 64, and the base's own dropout (OPT, GPT-2) is off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import CHAT_TEMPLATE, save_tokenizer

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

    def save(self, folder: Path, seed: int = 0, **changes: Any) -> Path:
        """Save a random tiny model in bfloat16 with a tokenizer."""
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        config = AutoConfig.for_model(self.model_type, **self.settings | changes)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start at zero, where a lost one would not show
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        save_tokenizer(folder, adds_bos=True, chat_template=CHAT_TEMPLATE)
        return folder


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
BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
Saver = Callable[[str], Path]
