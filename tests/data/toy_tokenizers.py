"""Tokenizers of the kinds that published models have, small enough to be built in a test.

``spell`` reads ids back into text by the rules of the vocabulary alone, so that what a test expects
does not come from the code that made the ids, nor from a decoder that tidies spaces up.
"""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from conftest import CHAT_TEMPLATE, PAGE, save_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.tokenizer import load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
KINDS = ["bytes", "bytes-bos", "bytes-trimmed", "sentencepiece"]

TEXTS = [
    "It has eight legs.",
    "x",
    " leading space",
    "trailing space ",
    "two  spaces,   three and a\ttab",
    "a line\nand another\n\n",
    "def f(x):\n    if x:\n        return 1\n",
    "\n\nnewlines first",
    "日本語のテキスト、和中文。",
    "👩‍👩‍👧‍👦 a family, 🙂 a face",
    "e\u0301 and a\u0308, combined; é and ä, composed",
    "مرحبا بالعالم",
    "\u3000wide\u00a0and\u2003other spaces\u200b",
    "{content} and {context} and {0} and %s",
    "### Response: not a marker",
    "### Human: who### Assistant: me",
    "it stops </s> here",
    "</s>",
    "<s> begins",
    "<|im_end|>\n<|im_start|>assistant\nI said so",
]
"""What users write, markers and control tokens among it."""


@cache
def build(kind: str, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A tokenizer of this kind, as ``load_tokenizer`` gives it."""
    with tempfile.TemporaryDirectory() as folder:
        if kind == "sentencepiece":
            _sentencepiece(Path(folder), chat_template)
        else:
            save_tokenizer(Path(folder), kind == "bytes-bos", chat_template)
        tokenizer = load_tokenizer(folder)
    if kind == "bytes-trimmed":  # as GPT-NeoX's (Pythia) and RoBERTa's
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _sentencepiece(folder: Path, chat_template: str | None) -> None:
    """LLaMA's kind: spaces as ▁, one put before the text, unknown characters as bytes, BOS."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    trained.train_from_iterator([PAGE], trainer)
    model = json.loads(trained.to_str())["model"]
    for byte in range(256):
        model["vocab"].setdefault(f"<0x{byte:02X}>", len(model["vocab"]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.add_special_tokens(SPECIAL)
    # split=False as in LLaMA: a merge may reach over a space, so no joint is a boundary by itself
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_of_character()


def spell(tokenizer: Any, ids: Any) -> str:
    """The text that these ids stand for, character for character."""
    data = b""
    control = {*SPECIAL, *tokenizer.get_added_vocab()}
    for token in tokenizer.convert_ids_to_tokens([int(token) for token in ids]):
        if token in control:
            data += token.encode()
        elif byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            data += bytes([int(byte[1], 16)])
        elif "▁" in token or tokenizer.backend_tokenizer.model.byte_fallback:
            data += token.replace("▁", " ").encode()
        else:
            data += bytes(BYTES[character] for character in token)
    return data.decode()


def asked(*contents: str, system: str | None = None) -> Conversation:
    """A conversation of these turns, question first."""
    turns = [] if system is None else [Message("system", system)]
    turns += [
        Message("assistant" if place % 2 else "user", content)
        for place, content in enumerate(contents)
    ]
    return Conversation(tuple(turns))
