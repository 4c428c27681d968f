"""The sizes of well-known models by name, as their config.json files state them.

So that a plan, a benchmark or a rehearsal needs no download: from the same fields
``transformers.AutoConfig.for_model(**fields)`` builds the same model.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from qlora_pl.errors import ConfigurationError

Fields = dict[str, Any]

ENDINGS = re.compile(
    r"[-_](instruct|chat|it|hf|base|deduped|v0\.1|v0\.2|v1|4k|128k|\d{4})(?=[-_]|$)"
)
"""Parts of Hub names that say how a model was trained further, not what its sizes are."""


def known_names() -> list[str]:
    """The short names, by family and size."""
    return list(_SHAPES)


def known_shape(name: str) -> Fields:
    """The fields of a model's config.json, ``model_type`` among them.

    Args:
        name: A short name (``llama2-7b``), or a model's name on the Hub.

    Raises:
        ConfigurationError: with the nearest names that are known.
    """
    short = short_name(name)
    if short is None:
        near = difflib.get_close_matches(_plain(name), [*_SHAPES, *_ALIASES], n=3, cutoff=0.4)
        shown = list(dict.fromkeys(_ALIASES.get(found, found) for found in near))
        hint = f"the nearest are {', '.join(shown)}" if shown else f"there are {', '.join(_SHAPES)}"
        raise ConfigurationError(
            f"shape: no model '{name}' is known here ({hint}); give a folder with its config.json "
            "instead."
        )
    return dict(_SHAPES[short])


def short_name(name: str) -> str | None:
    """The short name of a model, however it is written; None if it is not known."""
    plain = _plain(name)
    found = _ALIASES.get(plain, plain)
    return found if found in _SHAPES else None


def _plain(name: str) -> str:
    """``meta-llama/Llama-2-7b-chat-hf`` -> ``llama-2-7b``."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return last if last in _SHAPES or last in _ALIASES else ENDINGS.sub("", last)


def _sizes(model_type: str, hidden: int, layers: int, heads: int, vocabulary: int) -> Fields:
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _llama(
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int = 32000,
    model_type: str = "llama",
    **others: Any,
) -> Fields:
    return _sizes(model_type, hidden, layers, heads, vocabulary) | {
        "intermediate_size": mlp,
        "num_key_value_heads": key_value_heads,
        **others,
    }


def _neox(hidden: int, layers: int, heads: int, vocabulary: int = 50304) -> Fields:
    sizes = _sizes("gpt_neox", hidden, layers, heads, vocabulary)
    return sizes | {"intermediate_size": 4 * hidden, "rotary_pct": 0.25}


def _bloom(hidden: int, layers: int, heads: int) -> Fields:
    return {
        "model_type": "bloom",
        "vocab_size": 250880,
        "hidden_size": hidden,
        "n_layer": layers,
        "n_head": heads,
    }


def _opt(hidden: int, layers: int, heads: int) -> Fields:
    return _sizes("opt", hidden, layers, heads, 50272) | {
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
        "max_position_embeddings": 2048,
    }


def _gpt2(hidden: int, layers: int, heads: int) -> Fields:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


def _t5(width: int, mlp: int, heads: int, layers: int, head_size: int = 64) -> Fields:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "d_ff": mlp,
        "d_kv": head_size,
        "num_heads": heads,
        "num_layers": layers,
        "decoder_start_token_id": 0,
    }


def _t5_v1_1(width: int, mlp: int, heads: int, layers: int) -> Fields:
    own = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return _t5(width, mlp, heads, layers) | own


LLAMA2: Fields = {"max_position_embeddings": 4096}
LLAMA3: Fields = {"max_position_embeddings": 8192, "rope_theta": 500000.0}
LLAMA32: Fields = {
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
MISTRAL: Fields = {
    "model_type": "mistral",
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
QWEN25: Fields = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0}
QWEN3: Fields = {
    "model_type": "qwen3",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}
TIED: Fields = {"tie_word_embeddings": True}
GEMMA: Fields = {"model_type": "gemma", "head_dim": 256, "vocabulary": 256000}
GEMMA2: Fields = {"model_type": "gemma2", "vocabulary": 256000}
SMOLLM2: Fields = {
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
FALCON_RW: Fields = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}

_SHAPES: dict[str, Fields] = {
    "llama-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52, 52),
    "llama-65b": _llama(8192, 22016, 80, 64, 64),
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, **LLAMA2),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, **LLAMA2),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8, **LLAMA2),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256, **LLAMA3),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, 128256, **LLAMA3),
    "llama3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, **LLAMA32),
    "llama3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, **LLAMA32),
    "llama-1b": _llama(2048, 5632, 22, 32, 4),  # TinyLlama
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, **MISTRAL),
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, 151936, **QWEN25, **TIED),
    "qwen2.5-1.5b": _llama(1536, 8960, 28, 12, 2, 151936, **QWEN25, **TIED),
    "qwen2.5-3b": _llama(2048, 11008, 36, 16, 2, 151936, **QWEN25, **TIED),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, **QWEN25),
    "qwen2.5-14b": _llama(5120, 13824, 48, 40, 8, 152064, **QWEN25),
    "qwen2.5-32b": _llama(5120, 27648, 64, 40, 8, 152064, **QWEN25),
    "qwen2.5-72b": _llama(8192, 29568, 80, 64, 8, 152064, **QWEN25),
    "qwen3-0.6b": _llama(1024, 3072, 28, 16, 8, 151936, **QWEN3, **TIED),
    "qwen3-1.7b": _llama(2048, 6144, 28, 16, 8, 151936, **QWEN3, **TIED),
    "qwen3-4b": _llama(2560, 9728, 36, 32, 8, 151936, **QWEN3, **TIED),
    "qwen3-8b": _llama(4096, 12288, 36, 32, 8, 151936, **QWEN3),
    "qwen3-14b": _llama(5120, 17408, 40, 40, 8, 151936, **QWEN3),
    "qwen3-32b": _llama(5120, 25600, 64, 64, 8, 151936, **QWEN3),
    "gemma-2b": _llama(2048, 16384, 18, 8, 1, **GEMMA),
    "gemma-7b": _llama(3072, 24576, 28, 16, 16, **GEMMA),
    "gemma2-2b": _llama(2304, 9216, 26, 8, 4, head_dim=256, **GEMMA2),
    "gemma2-9b": _llama(3584, 14336, 42, 16, 8, head_dim=256, **GEMMA2),
    "gemma2-27b": _llama(
        4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144, **GEMMA2
    ),
    "phi-3-mini": _llama(3072, 8192, 32, 32, 32, 32064, "phi3", max_position_embeddings=4096),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, **SMOLLM2),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, **SMOLLM2),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, **SMOLLM2),
    "pythia-70m": _neox(512, 6, 8),
    "pythia-160m": _neox(768, 12, 12),
    "pythia-410m": _neox(1024, 24, 16),
    "pythia-1b": _neox(2048, 16, 8),
    "pythia-1.4b": _neox(2048, 24, 16),
    "pythia-2.8b": _neox(2560, 32, 32),
    "pythia-6.9b": _neox(4096, 32, 32, 50432),
    "pythia-12b": _neox(5120, 36, 40, 50688),
    "gpt-neox-20b": _neox(6144, 44, 64, 50432),
    "falcon-7b": _sizes("falcon", 4544, 32, 71, 65024) | {"multi_query": True, "bias": False},
    "falcon-40b": _sizes("falcon", 8192, 60, 128, 65024)
    | {"num_kv_heads": 8, "new_decoder_architecture": True, "bias": False},
    "falcon-rw-1b": _sizes("falcon", 2048, 24, 32, 50304) | FALCON_RW,
    "falcon-rw-7b": _sizes("falcon", 4096, 36, 64, 65024) | FALCON_RW,
    "bloom-560m": _bloom(1024, 24, 16),
    "bloom-1b1": _bloom(1536, 24, 16),
    "bloom-1b7": _bloom(2048, 24, 16),
    "bloom-3b": _bloom(2560, 30, 32),
    "bloom-7b1": _bloom(4096, 30, 32),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "t5-small": _t5(512, 2048, 8, 6),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 16, 24),
    "t5-3b": _t5(1024, 16384, 32, 24, 128),
    "t5-11b": _t5(1024, 65536, 128, 24, 128),
    "t5-v1_1-small": _t5_v1_1(512, 1024, 6, 8),
    "t5-v1_1-base": _t5_v1_1(768, 2048, 12, 12),
    "t5-v1_1-large": _t5_v1_1(1024, 2816, 16, 24),
    "t5-v1_1-xl": _t5_v1_1(2048, 5120, 32, 24),
    "t5-v1_1-xxl": _t5_v1_1(4096, 10240, 64, 24),
}

_ALIASES: dict[str, str] = {
    "llama-30b": "llama-33b",  # 32.5 billion; the Hub's copies say 30b, the papers 33B
    "llama-7b-hf": "llama-7b",
    "tinyllama-1.1b": "llama-1b",
    "tinyllama": "llama-1b",
    "llama-2-7b": "llama2-7b",
    "llama-2-13b": "llama2-13b",
    "llama-2-70b": "llama2-70b",
    "tinyllama_v1.1": "llama-1b",
    "tinyllama-1.1b-chat-v1.0": "llama-1b",
    "llama-3.2-1b": "llama3.2-1b",
    "llama-3.2-3b": "llama3.2-3b",
    **{
        f"{meta}llama-3{version}-{size}": f"llama3-{size}"
        for meta in ("", "meta-")
        for version in ("", ".1", ".3")
        for size in ("8b", "70b")
    },
    "codellama-13b": "llama2-13b",
    "gemma-2-2b": "gemma2-2b",
    "gemma-2-9b": "gemma2-9b",
    "gemma-2-27b": "gemma2-27b",
    "phi-3-mini-4k": "phi-3-mini",
    "pythia-1.4b-v0": "pythia-1.4b",
    **{f"bloomz-{size}": f"bloom-{size}" for size in ("560m", "1b1", "1b7", "3b", "7b1")},
    "falcon-7b-v1": "falcon-7b",
    **{f"flan-t5-{size}": f"t5-v1_1-{size}" for size in ("small", "base", "large", "xl", "xxl")},
    **{f"openai-{size}": size for size in ("gpt2",)},
    **{f"qwen2-{size}": f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "72b")},
}
