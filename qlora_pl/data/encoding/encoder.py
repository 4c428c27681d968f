"""Conversations -> token ids, and which of them are trained.

The rendered text is tokenised as a whole, and labels come from the characters that each token
covers: pieces tokenised apart would put SentencePiece's leading space into a row's middle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.example import EncodedExample, TracedExample
from qlora_pl.data.encoding.lengths import Limits, fit_to_length, needed_lengths
from qlora_pl.data.encoding.tokenization import TextTokenizer, Tokens
from qlora_pl.data.templates.template import PromptTemplate, Rendering, Segment

TrainOn = Literal["answers", "last_answer", "answers_and_system", "everything"]
TOKENIZER_CHUNK = 512
"""Rows handed to the tokenizer at a time; batched calls are about 1.5 times faster than single."""


class Encoder:
    """Turns conversations into ids and labels.

    Args:
        template: Renders the conversations.
        tokenizer: A fast transformers tokenizer.
        train_on: Whose tokens are trained: every answer, the last one of each row, answers and
            system messages, or everything.
        append_eos: Whether plain text ends in the end-of-text token.
    """

    is_paired = False
    """Whether its rows are pairs for an encoder-decoder model."""

    def __init__(
        self,
        template: PromptTemplate,
        tokenizer: Any,
        train_on: TrainOn = "answers",
        append_eos: bool = True,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.append_eos = append_eos
        self.stop_ids = stop_token_ids(template, tokenizer)
        self._text_tokenizer = TextTokenizer(tokenizer, template.stop)
        self._bos_token: str | None = tokenizer.bos_token
        self._bos_id = tokenizer.bos_token_id
        self._eos_token: str = tokenizer.eos_token
        # Whether this tokenizer begins every text with its BOS token, as LLaMA's does.
        probe = tokenizer("a")["input_ids"]
        self._adds_bos = self._bos_id is not None and probe[0] == self._bos_id

    def definition(self) -> dict[str, Any]:
        """All that decides what rows become, besides the tokenizer, in plain types."""
        return {
            "encoder": type(self).__name__,
            "template": self.template.definition(),
            "train_on": self.train_on,
            "append_eos": self.append_eos,
            "adds_bos": self._adds_bos,
        }

    # -- rows --------------------------------------------------------------------------------------

    def render(self, conversations: Sequence[Conversation]) -> list[tuple[bool, list[Rendering]]]:
        """What each conversation becomes as text; and whether its own text spells a control token.

        Raises:
            ConfigurationError: if the template cannot render one of them.
        """
        spells = [self._text_tokenizer.spells_control(c) for c in conversations]
        marks = [apart or self.train_on == "answers_and_system" for apart in spells]
        rendered: list[list[Rendering]] = [[] for _ in conversations]
        for marks_content in (False, True):
            chosen = [
                place
                for place, c in enumerate(conversations)
                if marks[place] == marks_content and not c.is_plain_text
            ]
            rows = self.template.render_rows(
                [conversations[place] for place in chosen],
                only_last=self.train_on == "last_answer",
                marks_content=marks_content,
            )
            for place, row in zip(chosen, rows, strict=True):
                rendered[place] = row
        for place, conversation in enumerate(conversations):
            if conversation.is_plain_text:
                rendered[place] = [self._plain_text(conversation)]
        return list(zip(spells, rendered, strict=True))

    def _plain_text(self, conversation: Conversation) -> Rendering:
        text = Segment(conversation.reference, True, 0, is_content=True)
        stop = [Segment(self._eos_token, True, 0)] if self.append_eos else []
        return Rendering([text, *stop])

    def encode(self, conversations: Sequence[Conversation]) -> list[list[EncodedExample]]:
        """The rows of tokens that each conversation becomes: one, or one for each of its answers.

        Raises:
            ConfigurationError: if the template cannot render one of them.
        """
        rendered = self.render(conversations)
        rows = [(apart, row) for apart, rows in rendered for row in rows]
        tokens = iter(
            self._text_tokenizer.encode([row for _, row in rows], [apart for apart, _ in rows])
        )
        return [
            self._examples(conversation, renderings, tokens, apart)
            for conversation, (apart, renderings) in zip(conversations, rendered, strict=True)
        ]

    def _examples(
        self,
        conversation: Conversation,
        renderings: Sequence[Rendering],
        tokens: Iterator[Tokens],
        spells_control: bool,
    ) -> list[EncodedExample]:
        examples = [
            self._label(conversation, r, next(tokens))._replace(spells_control=spells_control)
            for r in renderings
        ]
        return [examples[place] for place in self._kept(examples)]

    def _kept(self, examples: Sequence[EncodedExample]) -> list[int]:
        """Which rows of a conversation are trained on, by their places."""
        places = range(len(examples))
        if self.train_on == "everything":  # of which rows that end earlier are the beginnings
            return list(places[-1:])
        # Answers that are rows of their own and weigh nothing
        return [p for p in places if len(examples) == 1 or examples[p].is_trained.any()]

    def _label(
        self, conversation: Conversation, rendering: Rendering, tokens: Tokens
    ) -> EncodedExample:
        bos = self._bos(rendering)
        num_added = len(bos)
        input_ids = np.array([*bos, *tokens.ids], dtype=np.int32)
        num_bos = int(len(input_ids) > 0 and input_ids[0] == self._bos_id)
        is_answer = np.zeros(len(input_ids), dtype=bool)
        weights = np.zeros(len(input_ids), dtype=np.float32)
        num_unstopped = num_straddling = 0
        for run in self._runs(conversation, rendering.segments):
            if not (run.is_answer or run.weight):
                continue
            first = tokens.token_at(run.start) + num_added
            end = len(input_ids) if run.is_last else tokens.token_at(run.end) + num_added
            is_answer[first:end] = run.is_answer
            weights[first:end] = run.weight
            if run.is_answer and first < len(input_ids):
                straddles = tokens.begins_before(first - num_added, run.start)
                num_straddling += run.start > 0 and straddles
            if run.is_answer and run.weight and (self.append_eos or not conversation.is_plain_text):
                ends_in_stop = first < end and int(input_ids[end - 1]) in self.stop_ids
                num_unstopped += not ends_in_stop
        weights[:num_bos] = 0
        is_trained = weights > 0
        is_uniform = bool((weights[is_trained] == 1).all())
        return EncodedExample(
            input_ids,
            is_trained,
            is_answer,
            num_bos,
            weights=None if is_uniform else weights,
            num_unstopped=num_unstopped,
            num_straddling=num_straddling,
            num_trimmed=rendering.num_trimmed,
        )

    def _runs(self, conversation: Conversation, segments: Sequence[Segment]) -> list[_Run]:
        """Stretches of characters that are trained alike."""
        runs: list[_Run] = []
        start = 0
        for segment in segments:
            end = start + len(segment.text)
            weight = self._weight(segment, conversation.messages)
            last = runs[-1] if runs else None
            is_next_turn = (
                last is not None and segment.is_answer and segment.message != last.message
            )
            if last is not None and last[2:4] == (segment.is_answer, weight) and not is_next_turn:
                runs[-1] = last._replace(end=end)
            else:
                runs.append(_Run(start, end, segment.is_answer, weight, segment.message))
            start = end
        if runs:
            runs[-1] = runs[-1]._replace(is_last=True)
        return runs

    def _weight(self, segment: Segment, messages: Sequence[Message]) -> float:
        message = None if segment.message is None else messages[segment.message]
        if self.train_on == "everything":
            return 1.0 if message is None else message.weight
        if message is None:
            return 0.0
        is_system = message.role == "system" and segment.is_content
        if segment.is_answer or (self.train_on == "answers_and_system" and is_system):
            return message.weight
        return 0.0

    def _bos(self, rendering: Rendering) -> list[int]:
        # A chat template may have written the token itself; twice would be a different prompt.
        first = rendering.segments[0] if rendering.segments else Segment("")
        is_written = not first.is_content and first.text.startswith(self._bos_token or "\0")
        return [self._bos_id] if self._adds_bos and not is_written else []

    # -- lengths -----------------------------------------------------------------------------------

    def fit(self, example: EncodedExample, limits: Limits) -> list[EncodedExample]:
        """The rows that are left of an example within the limits."""
        return fit_to_length(example, limits.max_length, limits.overlong, self.stop_ids)

    def needed(self, example: EncodedExample, limits: Limits) -> np.ndarray:
        """``(num_trained,)`` int64: the limit from which on each trained token is kept."""
        return needed_lengths(example, limits.overlong)

    # -- looking at rows ---------------------------------------------------------------------------

    def trace(self, conversation: Conversation) -> list[TracedExample]:
        """The rows of ``encode``, each with its text and the characters of its tokens."""
        ((apart, renderings),) = self.render([conversation])
        tokens = self._text_tokenizer.encode(renderings, [apart] * len(renderings))
        examples = [
            self._label(conversation, rendering, found)._replace(spells_control=apart)
            for rendering, found in zip(renderings, tokens, strict=True)
        ]
        return [
            TracedExample(
                examples[place],
                renderings[place].text,
                [(0, 0)] * len(self._bos(renderings[place])) + tokens[place].spans(),
            )
            for place in self._kept(examples)
        ]

    def spells_control(self, conversation: Conversation) -> bool:
        """Whether a message's own text spells a control token."""
        return self._text_tokenizer.spells_control(conversation)

    @property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Finds what is a control token where the template writes it, and text where a row does."""
        return self._text_tokenizer.control_pattern

    # -- prompts -----------------------------------------------------------------------------------

    def encode_prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """Text and ids of a prompt, the very ids with which a row of this prompt begins."""
        spells = self._text_tokenizer.spells_control(conversation)
        rendering = self.template.render_prompt(conversation, marks_content=spells)
        (tokens,) = self._text_tokenizer.encode([rendering], [spells])
        text = rendering.text
        return text, [*self._bos(rendering), *tokens.ids]


class _Run(NamedTuple):
    start: int
    end: int
    is_answer: bool
    weight: float
    message: int | None
    is_last: bool = False


def stop_token_ids(template: PromptTemplate, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: the end-of-text token, and what the template ends a turn with.

    So generation stops at the very token that training taught (``<|im_end|>`` of a chat template
    whose end-of-text token is another).
    """
    stop = tokenizer.convert_tokens_to_ids(template.stop) if template.stop else None
    return frozenset({tokenizer.eos_token_id} | ({stop} if stop is not None else set()))
