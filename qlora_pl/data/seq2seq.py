"""Conversations -> pairs of a source and a target, for models with an encoder and a decoder.

What a template makes of a question is the source, and the answer's own words are the target; each
is framed by the special tokens that the tokenizer gives a text (T5's: EOS at the end). A pair is
kept as one row, source before target with the target trained, so that everything that counts,
orders, keeps and resumes rows serves both kinds of model; ``collate_pairs`` takes it apart again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qlora_pl.batch import FILLER_ROW, IGNORE_INDEX, Seq2SeqBatch
from qlora_pl.data.batching import WIDTH_MULTIPLE
from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding import EncodedExample, EncodedRows, Encoder
from qlora_pl.data.templates import PromptTemplate
from qlora_pl.errors import ConfigurationError


class Seq2SeqEncoder:
    """Turns conversations into pairs; used as ``Encoder`` is.

    Args:
        template: Renders the questions.
        tokenizer: A fast transformers tokenizer.
        max_length: Tokens that a source may have, its special tokens among them.
        max_target_length: Tokens that a target may have; None: ``max_length``.
    """

    def __init__(
        self,
        template: PromptTemplate,
        tokenizer: Any,
        max_length: int,
        max_target_length: int | None = None,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_target_length = max_length if max_target_length is None else max_target_length
        self.stop_ids = frozenset({int(tokenizer.eos_token_id)})
        self._before, self._after = _frame(tokenizer)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[EncodedExample]]:
        """One pair for each trained answer, given everything that was said before it.

        Raises:
            ConfigurationError: for plain text, which has no question to be the source.
        """
        asked = [list(_trained_answers(conversation)) for conversation in conversations]
        questions = [self.template.render_prompt(before) for row in asked for before, _ in row]
        sources = iter(self._tokenize(questions))
        targets = iter(self._tokenize([answer for row in asked for _, answer in row]))
        return [[self._pair(next(sources), next(targets)) for _ in row] for row in asked]

    def encode_prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """Text and ids of a source, as in training."""
        text = self.template.render_prompt(conversation)
        return text, [*self._before, *self._tokenize([text])[0], *self._after]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def _pair(self, source: list[int], target: list[int]) -> EncodedExample:
        # A source that is cut keeps its frame. A target does not: an end in the middle of an
        # answer would teach to stop there.
        frame = len(self._before) + len(self._after)
        kept = source[: max(0, self.max_length - frame)]
        source_ids = [*self._before, *kept, *self._after]
        whole = [*self._before, *target, *self._after]
        target_ids = whole[: self.max_target_length]
        num_lost = len(whole) - len(target_ids)
        return EncodedExample(
            np.asarray([*source_ids, *target_ids], dtype=np.int32),
            np.repeat([False, True], [len(source_ids), len(target_ids)]),
            num_cut_tokens=len(source) - len(kept) + num_lost,
            num_lost_tokens=num_lost,
            num_answer_tokens=len(target_ids),
            ends_in_stop=target_ids[-1] in self.stop_ids,
            num_straddling=0,
        )


def choose_encoder(
    model_config: Any,
    template: PromptTemplate,
    tokenizer: Any,
    max_lengths: tuple[int, int | None],
    train_on_prompt: bool,
) -> Encoder | Seq2SeqEncoder:
    """The encoder that a model's rows need, told from its transformers configuration.

    Args:
        model_config: None: of a causal model.
        template: Renders conversations.
        tokenizer: A fast transformers tokenizer.
        max_lengths: ``data.max_length`` and ``data.max_target_length``.
        train_on_prompt: Whether prompts are trained too.

    Raises:
        ConfigurationError: for settings that have no meaning for such a model.
    """
    if not getattr(model_config, "is_encoder_decoder", False):
        if max_lengths[1] is not None:
            raise ConfigurationError(
                "data.max_target_length: a causal model's questions and answers share "
                "data.max_length; remove it."
            )
        return Encoder(template, tokenizer, max_lengths[0], train_on_prompt)
    if train_on_prompt:
        raise ConfigurationError(
            "data.train_on_prompt: an encoder-decoder model's questions are read by its encoder, "
            "which predicts nothing; set it to false."
        )
    return Seq2SeqEncoder(template, tokenizer, *max_lengths)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text, EOS at the end at least."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    before, after = framed[:start], framed[start + len(plain) :]
    return before, after if tokenizer.eos_token_id in after else [*after, tokenizer.eos_token_id]


def _trained_answers(conversation: Conversation) -> list[tuple[Conversation, str]]:
    if conversation.is_plain_text:
        raise ConfigurationError(
            "plain text has no question for an encoder to read; name a format with questions and "
            "answers (data.sources: format)."
        )
    return [
        (Conversation(conversation.messages[:place]), message.content)
        for place, message in enumerate(conversation.messages)
        if message.role == "assistant" and message.weight > 0
    ]


def collate_pairs(rows: EncodedRows, row_ids: np.ndarray, pad_id: int) -> Seq2SeqBatch:
    """Take pairs apart and pad each side on the right, to a multiple of 8.

    No pairs at all give one padding token on either side without a label, as ``collate`` does.

    Args:
        rows: Pairs, as ``Seq2SeqEncoder`` makes them.
        row_ids: Which of them.
        pad_id: The id that fills short sources.
    """
    sources, targets = [], []
    for ids, labels in (rows[row] for row in row_ids):
        first = int(np.argmax(labels != IGNORE_INDEX))
        sources.append(ids[:first])
        targets.append(labels[first:])
    if not sources:
        sources, targets = [np.full(1, pad_id)], [np.full(1, IGNORE_INDEX)]
        row_ids = np.array([FILLER_ROW])
    input_ids, attention_mask = _pad(sources, pad_id)
    padded_labels, decoder_attention_mask = _pad(targets, IGNORE_INDEX)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": padded_labels,
        "decoder_attention_mask": decoder_attention_mask,
        "row_ids": torch.from_numpy(np.asarray(row_ids, dtype=np.int64)),
    }


def _pad(sides: Sequence[np.ndarray], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, T)`` int64 tokens, and 1 where they are not padding."""
    width = math.ceil(max(len(side) for side in sides) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    tokens = torch.full((len(sides), width), filler, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for place, side in enumerate(sides):
        tokens[place, : len(side)] = torch.from_numpy(np.asarray(side, dtype=np.int64))
        mask[place, : len(side)] = 1
    return tokens, mask
