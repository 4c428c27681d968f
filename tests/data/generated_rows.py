"""Conversations of every shape and script, made from a seed, and how a test names its encoders."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import real_tokenizers
import toy_tokenizers

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding.encoder import Encoder, TrainOn, stop_token_ids
from qlora_pl.data.encoding.tokenization import TextTokenizer
from qlora_pl.data.templates.loading import load_template

KINDS = [*toy_tokenizers.KINDS, *real_tokenizers.REAL]
FRAGMENTS = [
    *toy_tokenizers.TEXTS,
    "量子化された重みは四ビットで保存される。",
    "他说, “模型会在这里停下来。”",
    "كيف حالك اليوم؟ ١٢٣",
    "Straßenbahnhaltestelle; Äpfel, Öl und Übermut",
    "x = [i ** 2 for i in range(10)]  # 1234567890",
    "\tif (a<b) { return a; }\r\n",
    "👨🏽‍🚀 and 🇩🇪",
    " ",
    "\n",
    "'s 're",
    *(f"it says {token} there" for token in real_tokenizers.CONTROL_TOKENS),
    *(token for token in real_tokenizers.CONTROL_TOKENS),
]
CLEAN = [
    text
    for text in FRAGMENTS
    if not any(t in text for t in (*real_tokenizers.CONTROL_TOKENS, *toy_tokenizers.SPECIAL))
]
"""Those that spell no control token of any tokenizer."""


def generated(seed: int, number: int, texts: list[str] = FRAGMENTS) -> list[Conversation]:
    """Of one to four turns, some with a system message or a context; no answer is empty."""
    chosen = random.Random(seed)

    def text() -> str:
        while not (made := "".join(chosen.choices(texts, k=chosen.randint(1, 3)))).strip():
            pass
        return made

    made = []
    for _ in range(number):
        contents = [text() for _ in range(2 * chosen.randint(1, 4))]
        system = chosen.choice([None, None, text()])
        conversation = toy_tokenizers.asked(*contents, system=system)
        if chosen.random() < 0.3:
            place = 0 if system is None else 1
            messages = list(conversation.messages)
            messages[place] = replace(messages[place], context=text())
            conversation = Conversation(tuple(messages))
        made.append(conversation)
    return made


def tokenizer(kind: str) -> Any:
    """A toy or a published tokenizer."""
    is_real = kind in real_tokenizers.REAL
    return real_tokenizers.real(kind) if is_real else toy_tokenizers.build(kind)


@cache
def has_tokens_of(kind: str, name: str) -> bool:
    """Whether a tokenizer has the control tokens that a template writes."""
    needed = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "<s>"}.get(name)
    return needed is None or needed in tokenizer(kind).get_added_vocab()


@cache
def text_tokenizer(kind: str, stop: str) -> TextTokenizer:
    """Shared by encoders, since each takes seconds to read a published vocabulary."""
    return TextTokenizer(tokenizer(kind), stop)


def encoder(kind: str, template: Any, train_on: TrainOn = "answers") -> Encoder:
    """An encoder of this tokenizer and template."""
    made = Encoder.__new__(Encoder)
    made.__dict__ = dict(_bare_encoder(kind).__dict__)  # a copy would leave the tokenizer out
    made.template = load_template(template, tokenizer(kind))
    made.train_on = train_on
    made.stop_ids = stop_token_ids(made.template, tokenizer(kind))
    made._text_tokenizer = text_tokenizer(kind, made.template.stop)
    return made


@cache
def _bare_encoder(kind: str) -> Encoder:
    return Encoder(load_template("plain", tokenizer(kind)), tokenizer(kind))
