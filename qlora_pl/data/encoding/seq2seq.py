"""Conversations -> pairs of a source and a target, for models with an encoder and a decoder.

What a template makes of a question is the source, and the answer's own words are the target; each
is framed by the special tokens that the tokenizer gives a text (T5's: EOS at the end). A pair is
kept as one row, source before target with the target trained, so that everything that counts,
orders, keeps and resumes rows serves both kinds of model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import Encoder, TrainOn
from qlora_pl.data.encoding.example import EncodedExample, TracedExample
from qlora_pl.data.encoding.lengths import Limits, fit_pair, needed_target_lengths, source_length
from qlora_pl.data.encoding.tokenization import Tokens
from qlora_pl.data.templates.template import PromptTemplate, Rendering, Segment
from qlora_pl.errors import ConfigurationError


class Seq2SeqEncoder(Encoder):
    """Turns conversations into pairs, one for each trained answer.

    Args:
        template: Renders what comes before an answer.
        tokenizer: A fast transformers tokenizer.
        train_on: ``answers``, or the ``last_answer`` of each conversation.
    """

    is_paired = True

    def __init__(
        self, template: PromptTemplate, tokenizer: Any, train_on: TrainOn = "answers"
    ) -> None:
        super().__init__(template, tokenizer, train_on)
        if train_on not in ("answers", "last_answer"):
            raise ConfigurationError(
                f"data.train_on: {train_on} has no meaning for an encoder-decoder model, whose "
                "encoder predicts nothing; choose answers or last_answer."
            )
        self._before, self._after = _frame(tokenizer)
        self.stop_ids = frozenset({self._after[-1]})

    def definition(self) -> dict[str, Any]:
        """See ``Encoder``."""
        return super().definition() | {"frame": [self._before, self._after]}

    def encode(self, conversations: Sequence[Conversation]) -> list[list[EncodedExample]]:
        """The pairs of each conversation: an answer, and everything that was said before it.

        Raises:
            ConfigurationError: for plain text, which has no question, or if the template cannot
                render one of them.
        """
        asked = [list(self._answers(conversation)) for conversation in conversations]
        answers = [answer for its in asked for answer in its]
        sides = [self._source(before) for before, _ in answers]
        sides += [self._target(message) for _, message in answers]
        tokens = self._text_tokenizer.encode([s for s, _ in sides], [apart for _, apart in sides])
        examples = iter(
            self._pair(message, source, target)._replace(
                num_trimmed=rendering.num_trimmed, spells_control=source_spells or target_spells
            )
            for (_, message), source, target, (rendering, source_spells), (_, target_spells) in zip(
                answers,
                tokens[: len(answers)],
                tokens[len(answers) :],
                sides[: len(answers)],
                sides[len(answers) :],
                strict=True,
            )
        )
        return [[next(examples) for _ in its] for its in asked]

    def trace(self, conversation: Conversation) -> list[TracedExample]:
        """See ``Encoder``; the text is that of both sides, frames cover none of it."""
        (examples,) = self.encode([conversation])
        return [
            self._trace_pair(example, self._source(before), self._target(message))
            for example, (before, message) in zip(
                examples, self._answers(conversation), strict=True
            )
        ]

    def _trace_pair(
        self,
        example: EncodedExample,
        source: tuple[Rendering, bool],
        target: tuple[Rendering, bool],
    ) -> TracedExample:
        sides, spells = [source[0], target[0]], [source[1], target[1]]
        text = ""
        spans: list[tuple[int, int]] = []
        for side, tokens in zip(sides, self._text_tokenizer.encode(sides, spells), strict=True):
            start = len(text)
            text += side.text
            spans += [(start, start)] * len(self._before)
            spans += [(start + first, start + end) for first, end in tokens.spans()]
            spans += [(len(text), len(text))] * len(self._after)
        return TracedExample(example, text, spans)

    def encode_prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """Text and ids of a source, as in training."""
        rendering, spells = self._source(conversation)
        (tokens,) = self._text_tokenizer.encode([rendering], [spells])
        return rendering.text, [*self._before, *tokens.ids, *self._after]

    def _answers(self, conversation: Conversation) -> Iterator[tuple[Conversation, Message]]:
        """Trained answers, each with what comes before it; the last one if none is trained."""
        if conversation.is_plain_text:
            raise ConfigurationError(
                "plain text has no question for an encoder to read; name a format with questions "
                "and answers in data.sources."
            )
        messages = conversation.messages
        places = [place for place, m in enumerate(messages) if m.role == "assistant"]
        trained = [place for place in places if messages[place].weight > 0]
        if self.train_on == "last_answer":
            trained = [place for place in trained if place == places[-1]]
        for place in trained or places[-1:]:
            yield Conversation(messages[:place]), messages[place]

    def _source(self, conversation: Conversation) -> tuple[Rendering, bool]:
        spells = self._text_tokenizer.spells_control(conversation)
        return self.template.render_prompt(conversation, marks_content=spells), spells

    def _target(self, message: Message) -> tuple[Rendering, bool]:
        spells = self._text_tokenizer.spells_control(Conversation((message,)))
        return Rendering([Segment(message.content, True, 0, is_content=True)]), spells

    def _pair(self, message: Message, source: Tokens, target: Tokens) -> EncodedExample:
        source_ids = [*self._before, *source.ids, *self._after]
        target_ids = [*self._before, *target.ids, *self._after]
        is_target = np.repeat([False, True], [len(source_ids), len(target_ids)])
        weight = np.float32(message.weight)
        return EncodedExample(
            np.array([*source_ids, *target_ids], dtype=np.int32),
            is_target & (weight > 0),
            is_target,
            num_bos=len(self._before),
            weights=None if weight in (0, 1) else is_target * weight,
        )

    def fit(self, example: EncodedExample, limits: Limits) -> list[EncodedExample]:
        """See ``Encoder``; each side has its limit, and a source that is cut keeps its frame.

        A target does not: an end in the middle of an answer would teach to stop there.
        """
        return fit_pair(example, limits, source_tail=len(self._after))

    def needed(self, example: EncodedExample, limits: Limits) -> np.ndarray:
        """See ``Encoder``; a pair that is left out as a whole needs both limits."""
        if limits.overlong == "cut":
            return needed_target_lengths(example)
        source = source_length(example)
        return np.full(example.num_trained, max(source, len(example.input_ids) - source))


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text, EOS at the end at least."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    before, after = framed[:start], framed[start + len(plain) :]
    return before, after if tokenizer.eos_token_id in after else [*after, tokenizer.eos_token_id]
