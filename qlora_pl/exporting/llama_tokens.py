"""The prompts of training beside the tokens that llama.cpp itself makes of them, where it is here.

A GGUF file has a tokenizer of llama.cpp's own making, which no look at the file can vouch for.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.served_template import Ids
from qlora_pl.exporting.parity import check_parity

WAY = "llama.cpp's tokenizer"
NOT_COMPARED = (
    "Tokens of prompts were not compared with llama.cpp's own, for which the package "
    "llama-cpp-python is needed (make llama-cpp)."
)
UNCOMPOSED = (
    "Letters whose accents are characters of their own (not NFC) are put together by this "
    "tokenizer first and not by llama.cpp, which makes other tokens of them. They were compared "
    "composed."
)


def compare_with_llama_cpp(file: Path, encoder: Encoder, folder: Path | None) -> str:
    """Hold the tokens of every example against those of a GGUF file.

    Args:
        file: Of a model.
        encoder: Training's.
        folder: Of the adapter, whose held-out rows are compared as well.

    Returns:
        What was compared, a paragraph.

    Raises:
        ConfigurationError: if a prompt differs, with the tokens around the place.
    """
    if encoder.is_paired or importlib.util.find_spec("llama_cpp") is None:
        return NOT_COMPARED
    with opened(file) as llama:
        text = check_parity(encoder, {WAY: ids_of(llama, encoder)}, folder).in_words()
    return f"{text} {UNCOMPOSED}" if composes(encoder.tokenizer) else text


def composes(tokenizer: Any) -> bool:
    """Whether a tokenizer puts letters and their accents together first (NFC), as Qwen's does."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The vocabulary of a GGUF file, within the block."""
    from llama_cpp import Llama

    llama = Llama(str(file), vocab_only=True, verbose=False)
    try:
        yield llama
    finally:
        llama.close()


def ids_of(llama: Any, encoder: Encoder) -> Ids:
    """Prompts as llama.cpp's server makes them of a rendered text, without a second BOS.

    Args:
        llama: From ``opened``.
        encoder: Renders the text.
    """
    is_composed = composes(encoder.tokenizer)
    adds_bos = llama.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    bos = encoder.tokenizer.bos_token or ""

    def ids(conversation: Conversation) -> list[int]:
        text = encoder.encode_prompt(conversation)[0]
        if adds_bos:
            text = text.removeprefix(bos)
        if is_composed:
            text = unicodedata.normalize("NFC", text)
        found: list[int] = llama.tokenize(text.encode(), add_bos=True, special=True)
        return found

    return ids
