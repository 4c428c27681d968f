"""Rows as qlora.py makes them, for runs that reproduce its papers' numbers.

Prompt and answer are tokenised apart, BOS written before the one and EOS after the other, and each
is cut on the right to a limit of its own: a long prompt loses its end, a long answer its EOS. Text
that spells a control token becomes one. For anything new use ``Encoder``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.example import EncodedExample, TracedExample
from qlora_pl.data.encoding.lengths import Limits, fit_pair, needed_target_lengths
from qlora_pl.data.templates.template import PromptTemplate, Rendering, Segment, TextTemplate
from qlora_pl.errors import ConfigurationError


class OriginalEncoder(Encoder):
    """``DataCollatorForCausalLM`` of artidoro/qlora, row for row.

    Args:
        template: A template of plain text. What it puts between a prompt and its answer (Alpaca's
            space) belongs to the prompt here; ``plain`` puts nothing.
        tokenizer: A fast transformers tokenizer.
        train_on: ``answers``, or ``everything`` (the original's ``--train_on_source``).
        append_eos: Whether EOS follows an answer.
    """

    def __init__(
        self,
        template: PromptTemplate,
        tokenizer: Any,
        train_on: Any = "answers",
        append_eos: bool = True,
    ) -> None:
        super().__init__(template, tokenizer, train_on, append_eos)
        if not isinstance(template, TextTemplate):
            raise ConfigurationError(
                "data.encoding: original knows no chat templates; choose a data.template of plain "
                "text, or encoding: spans."
            )
        if train_on not in ("answers", "everything"):
            raise ConfigurationError(
                f"data.encoding: original trains answers or everything, not {train_on}; choose one "
                "of them for data.train_on, or encoding: spans."
            )

    def encode(self, conversations: Sequence[Conversation]) -> list[list[EncodedExample]]:
        """One row for each conversation: what was said before its last answer, and that answer."""
        pairs = [self._texts(conversation) for conversation in conversations]
        sources = self._tokenize([(self._bos_token or "") + source for source, _ in pairs])
        eos = self._eos_token if self.append_eos else ""
        targets = self._tokenize([target + eos for _, target in pairs])
        return [
            [self._pair(source, target)._replace(spells_control=self.spells_control(conversation))]
            for conversation, source, target in zip(conversations, sources, targets, strict=True)
        ]

    def _texts(self, conversation: Conversation) -> tuple[str, str]:
        if conversation.is_plain_text:
            return "", conversation.reference
        return self._source(conversation.prompt), conversation.reference

    def _source(self, conversation: Conversation) -> str:
        assert isinstance(self.template, TextTemplate)
        joint = self.template.answer.partition("{content}")[0]
        return self.template.render_prompt(conversation).text + (
            "" if self.template.name == "plain" else joint
        )

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def _pair(self, source: Sequence[int], target: Sequence[int]) -> EncodedExample:
        input_ids = np.array([*source, *target], dtype=np.int32)
        is_answer = np.repeat([False, True], [len(source), len(target)])
        is_trained = np.ones_like(is_answer) if self.train_on == "everything" else is_answer
        return EncodedExample(input_ids, is_trained, is_answer)

    def trace(self, conversation: Conversation) -> list[TracedExample]:
        """See ``Encoder``; the text is that of both sides, one after the other."""
        source, target = self._texts(conversation)
        texts = [(self._bos_token or "") + source, target + self._eos_token * self.append_eos]
        whole = [Rendering([Segment(text)]) for text in texts]  # in one pass, as in ``encode``
        asked, answered = self._text_tokenizer.encode(whole, [False, False])
        shifted = [(start + len(texts[0]), end + len(texts[0])) for start, end in answered.spans()]
        example = self._pair(asked.ids, answered.ids)._replace(
            spells_control=self.spells_control(conversation)
        )
        return [TracedExample(example, "".join(texts), [*asked.spans(), *shifted])]

    def encode_prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """Text and ids of a prompt, as its row begins when nothing is cut."""
        text = (self._bos_token or "") + self._source(conversation)
        return text, self._tokenize([text])[0]

    def fit(self, example: EncodedExample, limits: Limits) -> list[EncodedExample]:
        """See ``Encoder``; each side has its limit."""
        return fit_pair(example, limits)

    def needed(self, example: EncodedExample, limits: Limits) -> np.ndarray:
        """See ``Encoder``."""
        return needed_target_lengths(example)
