"""A ``Conversation`` -> segments of text: whose turn each is, and what the model is to write.

Which of it is trained is decided later, by the encoder: a template only says where answers are.
"""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.errors import ConfigurationError, did_you_mean


class Segment(NamedTuple):
    """A stretch of the rendered text."""

    text: str
    is_answer: bool = False
    """Whether the model is to write it: an answer, up to and with its stop token."""
    message: int | None = None
    """The place of the message whose turn it is; None: the template's own text, or not told."""
    is_content: bool = False
    """Whether it is the row's, so that nothing in it is a control token; of a chat template's text,
    what a system message says and what spells a control token."""


class Rendering(NamedTuple):
    """One row of text that a conversation becomes."""

    segments: list[Segment]
    num_trimmed: int = 0
    """Messages whose first or last spaces the template left out."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(segment.text for segment in self.segments)


class PromptTemplate(ABC):
    """Renders conversations; the same object serves training, validation and use."""

    name: str
    stop: str
    """The token that ends an answer, as text."""

    @abstractmethod
    def render_rows(
        self,
        conversations: Sequence[Conversation],
        only_last: bool = False,
        marks_content: bool = False,
    ) -> list[list[Rendering]]:
        """What each conversation becomes: one row, or several where turns must be taken apart.

        Args:
            conversations: None of them plain text.
            only_last: Whether the last answer alone counts as one.
            marks_content: Whether segments must tell the row's text from the template's.
        """

    @abstractmethod
    def render_prompt(self, conversation: Conversation, marks_content: bool = False) -> Rendering:
        """The text after which the model's next answer follows."""

    @abstractmethod
    def definition(self) -> dict[str, str]:
        """All that decides what it renders, in plain types."""

    def render(self, conversation: Conversation) -> list[Segment]:
        """The segments of a conversation that becomes one row."""
        ((rendering,),) = self.render_rows([conversation])
        return rendering.segments


@dataclass(frozen=True, kw_only=True)
class TextTemplate(PromptTemplate):
    """Plain text around the turns, written as formats.

    In all of them ``{bos}`` and ``{eos}`` are the tokenizer's; braces are doubled to stand for
    themselves.
    """

    name: str
    question: str
    """A question without context; ``{content}``."""
    answer: str
    """An answer; ``{content}``."""
    answer_cue: str = ""
    """What the answer follows."""
    stop: str = ""
    """The token that ends an answer; empty: the tokenizer's end of text."""
    question_with_context: str = ""
    """A question with context, ``{content}`` and ``{context}``; empty: joined by a blank line."""
    system: str = "{content}\n\n"
    """A system message; ``{content}``."""
    question_with_system: str = ""
    """The first question where there is a system message, ``{content}`` and ``{system}``, for
    templates that fold it in; a context is joined by a blank line. Empty: ``system`` comes
    before it."""
    preamble: str = ""
    """Before the first question, when the conversation has no system message of its own."""
    preamble_with_context: str = ""
    """The same before a first question that has context; empty: ``preamble``."""
    separator: str = ""
    """Between an answer and the next question."""

    def definition(self) -> dict[str, str]:
        """See ``PromptTemplate``."""
        return asdict(self)

    def render_rows(
        self,
        conversations: Sequence[Conversation],
        only_last: bool = False,
        marks_content: bool = False,
    ) -> list[list[Rendering]]:
        """See ``PromptTemplate``; every conversation is one row."""
        return [[Rendering(list(self._segments(c.messages, only_last)))] for c in conversations]

    def render_prompt(self, conversation: Conversation, marks_content: bool = False) -> Rendering:
        """See ``PromptTemplate``."""
        segments = list(self._segments(conversation.messages, only_last=False))
        return Rendering([*segments, *_fill(self.answer_cue, None)])

    def _segments(self, messages: Sequence[Message], only_last: bool) -> Iterator[Segment]:
        system = None
        has_asked = False
        for place, message in enumerate(messages):
            if (
                message.role == "system"
            ):  # an empty one, as datasets with such a column have, is none
                system = message.content or None
                if system and not self.question_with_system:
                    yield from _fill(self.system, place, content=system)
            elif message.role == "user":
                if has_asked:
                    yield from _fill(self.separator, None)
                yield from self._question(message, place, system, is_first=not has_asked)
                has_asked = True
            else:
                yield from _fill(self.answer_cue, None)
                is_answer = place == len(messages) - 1 or not only_last
                answer = _fill(self.answer, place, is_answer, content=message.content)
                yield from (*answer, Segment(self.stop, is_answer, place))

    def _question(
        self, message: Message, place: int, system: str | None, is_first: bool
    ) -> Iterator[Segment]:
        preamble = self.preamble if is_first and system is None else ""
        folds_system = is_first and system is not None and self.question_with_system
        content, context = message.content, message.context
        if context and self.question_with_context and not folds_system:
            if preamble:
                preamble = self.preamble_with_context or preamble
            yield from _fill(preamble, None)
            yield from _fill(self.question_with_context, place, content=content, context=context)
            return
        if context:
            content = f"{content}\n\n{context}"
        yield from _fill(preamble, None)
        if folds_system and system is not None:
            for segment, field in _filled(
                self.question_with_system, place, content=content, system=system
            ):
                # The system message, which comes first, is whose its text is.
                yield segment._replace(message=0) if field == "system" else segment
        else:
            yield from _fill(self.question, place, content=content)


def control_tokens(tokenizer: Any, stop: str) -> dict[str, Any]:
    """Tokens that a template may write and a row's own text may not, each with its entry.

    Args:
        tokenizer: A fast transformers tokenizer.
        stop: The template's stop token; it, and tokens with a role such as the end of text, are
            control tokens whatever their entries say.
    """
    named = {stop, *tokenizer.all_special_tokens}
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return {token.content: token for token in added if token.special or token.content in named}


def control_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """Finds control tokens in a text, the longest at each place; None where there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


@lru_cache(maxsize=256)
def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    return tuple((literal, field) for literal, field, _, _ in string.Formatter().parse(text))


def _fill(
    text: str, message: int | None, is_answer: bool = False, **values: str
) -> Iterator[Segment]:
    return (segment for segment, _ in _filled(text, message, is_answer, **values))


def _filled(
    text: str, message: int | None, is_answer: bool = False, **values: str
) -> Iterator[tuple[Segment, str | None]]:
    for literal, field in _parts(text):
        if literal:
            yield Segment(literal, is_answer, message), None
        if field and values[field]:
            yield Segment(values[field], is_answer, message, is_content=True), field


FIELDS = {  # what the formats of a template may name
    "question_with_context": {"content", "context"},
    "question_with_system": {"content", "system"},
    "question": {"content"},
    "answer": {"content"},
    "system": {"content"},
}


def text_template(name: str, texts: Mapping[str, Any], tokenizer: Any) -> TextTemplate:
    """A template of these formats, with the tokenizer's tokens put in.

    Raises:
        ConfigurationError: for an unknown field, a format that lacks its content, or a token that
            the tokenizer does not have.
    """
    known = [field.name for field in fields(TextTemplate) if field.name != "name"]
    problems = []
    for field, text in texts.items():
        if field not in known:
            problems.append(f"a template has no field '{field}'{did_you_mean(str(field), known)}")
        elif not isinstance(text, str):
            problems.append(f"{field} must be text, got {text!r}.")
        elif problem := _format_problem(field, text):
            problems.append(problem)
    problems += [f"it needs '{name}'." for name in ("question", "answer") if name not in texts]
    if problems:
        raise ConfigurationError(f"data.template: {problem}" for problem in problems)
    tokens = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token}
    filled = {field: _with_tokens(text, tokens) for field, text in texts.items()}
    filled["stop"] = filled.get("stop") or tokenizer.eos_token
    for token in sorted(set(re.findall(r"<\|\w+\|>", "".join(filled.values())))):
        if token not in tokenizer.get_added_vocab():
            raise ConfigurationError(
                f"data.template: '{name}' writes {token}, which is no token of "
                f"'{tokenizer.name_or_path}'; choose the template that its base was trained with."
            )
    return TextTemplate(name=name, **filled)


def _format_problem(field: str, text: str) -> str | None:
    needed = FIELDS.get(field, set())
    try:
        named = {part for _, part in _parts(text) if part is not None}
    except ValueError as error:
        return f"{field} is no format ({error}); double the braces that stand for themselves."
    if unknown := named - needed - {"bos", "eos"}:
        return f"{field} names {{{sorted(unknown)[0]}}}, known there: {sorted(needed) or 'none'}."
    if text and (lacking := needed - named):
        return f"{field} lacks {{{sorted(lacking)[0]}}}."
    return None


def _with_tokens(text: str, tokens: Mapping[str, str]) -> str:
    return "".join(
        literal.replace("{", "{{").replace("}", "}}")
        + (tokens.get(field, f"{{{field}}}") if field else "")
        for literal, field in _parts(text)
    )
