"""A ``Conversation`` -> segments of text, each trained or not.

The space or newline at a joint belongs to the answer's side: a prompt that ends in a space would be
tokenised differently in training (" The" is one token) and in use (" " stands alone).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.errors import ConfigurationError, did_you_mean


class Segment(NamedTuple):
    """A stretch of the rendered text."""

    text: str
    is_trained: bool


class PromptTemplate(ABC):
    """Renders conversations; the same object serves training, validation and use."""

    name: str

    @abstractmethod
    def render(self, conversation: Conversation) -> list[Segment]:
        """The whole conversation; every answer is trained up to and with its stop token."""

    @abstractmethod
    def render_prompt(self, conversation: Conversation) -> str:
        """The text after which the model's next answer follows."""


@dataclass(frozen=True)
class TextTemplate(PromptTemplate):
    """Plain-text markers around the turns; the tokenizer's end-of-text token ends each answer."""

    name: str
    question: str
    """Format of a question without context; ``{content}``."""
    answer_cue: str
    """What the answer follows."""
    answer: str
    """Format of an answer; ``{content}``."""
    eos_token: str
    question_with_context: str = ""
    """Format of a question with context, ``{content}`` and ``{context}``; empty: joined by a
    blank line."""
    preamble: str = ""
    """Before the first question, when the conversation has no system message of its own."""
    preamble_with_context: str = ""
    separator: str = ""
    """Between an answer and the next question."""

    def render(self, conversation: Conversation) -> list[Segment]:
        """See ``PromptTemplate``; plain text is trained whole, then stops."""
        if conversation.is_plain_text:
            return [Segment(conversation.reference + self.eos_token, True)]
        segments: list[Segment] = []
        pending = ""
        for message in conversation.messages:
            if message.role == "assistant":
                segments.append(Segment(pending + self.answer_cue, False))
                answer = self.answer.format(content=message.content) + self.eos_token
                segments.append(Segment(answer, True))
                pending = self.separator
            else:
                pending += self._asked(message, is_first=not segments and not pending)
        return segments

    def render_prompt(self, conversation: Conversation) -> str:
        """See ``PromptTemplate``."""
        asked = Conversation((*conversation.messages, Message("assistant", "?")))
        return "".join(segment.text for segment in self.render(asked)[:-1])

    def _asked(self, message: Message, is_first: bool) -> str:
        if message.role == "system":  # an empty one, as datasets with such a column have, is none
            return message.content + "\n\n" if message.content else ""
        preamble = self.preamble if is_first else ""
        if not message.context:
            return preamble + self.question.format(content=message.content)
        if not self.question_with_context:
            content = f"{message.content}\n\n{message.context}"
            return preamble + self.question.format(content=content)
        preamble = self.preamble_with_context if is_first else ""
        return preamble + self.question_with_context.format(
            content=message.content, context=message.context
        )


class ChatTemplate(PromptTemplate):
    """The template that the tokenizer brings along.

    The trained spans come from rendering the conversation up to each answer, with and without it,
    and never from searching the text: a user who types the marker cannot move them.
    """

    name = "chat"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def _text(self, messages: tuple[Message, ...], asks: bool) -> str:
        turns = [
            {
                "role": message.role,
                "content": f"{message.content}\n\n{message.context}"
                if message.context
                else message.content,
            }
            for message in messages
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # whatever the template raises: a role that it does not know
            raise ConfigurationError(
                "data.template: the tokenizer's chat template refuses this conversation "
                f"({error}); choose another template."
            ) from error
        assert isinstance(text, str)
        return text

    def render(self, conversation: Conversation) -> list[Segment]:
        """See ``PromptTemplate``.

        Raises:
            ConfigurationError: if the template refuses the conversation, or rewrites earlier turns
                when later ones come, so that no span can be told.
        """
        if conversation.is_plain_text:
            return [Segment(conversation.reference + self._tokenizer.eos_token, True)]
        segments: list[Segment] = []
        done = ""
        for place, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            asked = self._text(conversation.messages[:place], asks=True)
            answered = self._text(conversation.messages[: place + 1], asks=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise ConfigurationError(
                    "data.template: the tokenizer's chat template renders an answer differently "
                    f"from its prompt (message {place + 1}), so its trained tokens cannot be told; "
                    "choose another template."
                )
            turn = answered[len(asked) :]
            answer = turn.rstrip()  # what follows the stop token is never generated
            segments.append(Segment(asked[len(done) :], False))
            segments.append(Segment(answer, True))
            segments.append(Segment(turn[len(answer) :], False))
            done = answered
        return segments

    def render_prompt(self, conversation: Conversation) -> str:
        """See ``PromptTemplate``."""
        return self._text(conversation.messages, asks=True)


ALPACA = (  # Stanford Alpaca's wording, with and without an input
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)

TEXT_TEMPLATES: dict[str, dict[str, str]] = {
    "alpaca": {
        "preamble": ALPACA,
        "preamble_with_context": ALPACA_WITH_INPUT,
        "question": "### Instruction:\n{content}\n\n",
        "question_with_context": "### Instruction:\n{content}\n\n### Input:\n{context}\n\n",
        "answer_cue": "### Response:",
        "answer": " {content}",
        "separator": "\n\n",
    },
    "instruction-response": {
        "question": "### Instruction:\n{content}\n\n",
        "answer_cue": "### Response:\n",
        "answer": "{content}",
        "separator": "\n\n",
    },
    # Nothing but the text itself, for bases that continue it; an answer follows after a space.
    "plain": {"question": "{content}", "answer_cue": "", "answer": " {content}"},
    # The spacing of the openassistant-guanaco rows, which the published Guanaco adapters saw.
    "guanaco": {
        "question": "### Human: {content}",
        "answer_cue": "### Assistant:",
        "answer": " {content}",
    },
}

TEMPLATES = ("auto", "chat", *TEXT_TEMPLATES)


def load_template(name: str, tokenizer: Any) -> PromptTemplate:
    """The template of this name, bound to the tokenizer that its stop token comes from.

    Args:
        name: One of ``TEMPLATES``; ``auto`` takes the tokenizer's chat template where it has one
            and ``instruction-response`` otherwise.
        tokenizer: A transformers tokenizer.

    Raises:
        ConfigurationError: for an unknown name, a tokenizer without a chat template, or one without
            an end-of-text token.
    """
    if name not in TEMPLATES:
        raise ConfigurationError(
            f"data.template: no template is called '{name}' (known: {', '.join(TEMPLATES)})"
            f"{did_you_mean(name, TEMPLATES)}"
        )
    has_chat_template = bool(getattr(tokenizer, "chat_template", None))
    if name == "auto":
        name = "chat" if has_chat_template else "instruction-response"
    if tokenizer.eos_token is None:
        raise ConfigurationError(
            f"data.tokenizer: '{tokenizer.name_or_path}' has no end-of-text token, so a model "
            "could not learn to stop; set eos_token in its tokenizer_config.json."
        )
    if name != "chat":
        return TextTemplate(name=name, eos_token=tokenizer.eos_token, **TEXT_TEMPLATES[name])
    if not has_chat_template:
        raise ConfigurationError(
            f"data.template: the tokenizer '{tokenizer.name_or_path}' has no chat template; choose "
            f"one of {', '.join(TEXT_TEMPLATES)}."
        )
    return ChatTemplate(tokenizer)
