"""A raw row -> a ``Conversation``: one function per family of columns.

The format is guessed from the column names when nobody names it, and the guess is reported with the
runner-up: a wrong guess is the kind of mistake that trains for hours without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from qlora_pl.data.conversation import Conversation, Message, Role
from qlora_pl.errors import ConfigurationError

Row = Mapping[str, Any]

# The names that speakers go by in published datasets.
SPEAKERS: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}


class RowError(ValueError):
    """A row is not what its format says; the reader adds which file and row."""


def _text(row: Row, column: str, default: str | None = None) -> str:
    value = row.get(column)
    if value is None:
        if default is not None:
            return default
        found = ", ".join(f"'{name}'" for name in row if row[name] is not None) or "nothing"
        raise RowError(f"no '{column}' field; found {found}")
    if not isinstance(value, str):
        raise RowError(f"'{column}' holds {type(value).__name__} {value!r:.60}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may spell one; no tokenizer takes it
        raise RowError(
            f"'{column}' holds half of a surrogate pair (character {error.start + 1})"
        ) from error
    return value


def alpaca(row: Row) -> Conversation:
    """``instruction``, ``output`` and an optional ``input`` (Alpaca, Dolly after renaming)."""
    question = Message("user", _text(row, "instruction"), context=_text(row, "input", default=""))
    return Conversation((question, Message("assistant", _text(row, "output"))))


def prompt_response(row: Row) -> Conversation:
    """``prompt`` and ``response``."""
    return _pair(row, "prompt", "response")


def prompt_completion(row: Row) -> Conversation:
    """``prompt`` and ``completion``."""
    return _pair(row, "prompt", "completion")


def question_answer(row: Row) -> Conversation:
    """``question`` and ``answer``."""
    return _pair(row, "question", "answer")


def input_output(row: Row) -> Conversation:
    """``input`` and ``output``; an empty input leaves only text to learn, as in the original."""
    if not _text(row, "input", default=""):
        return Conversation.from_text(_text(row, "output"))
    return _pair(row, "input", "output")


def _pair(row: Row, asked: str, answered: str) -> Conversation:
    return Conversation(
        (Message("user", _text(row, asked)), Message("assistant", _text(row, answered)))
    )


def text(row: Row) -> Conversation:
    """``text``: learnt as it stands, every token trained."""
    return Conversation.from_text(_text(row, "text"))


GUANACO_TURN = re.compile(r"### (Human|Assistant):")


def guanaco(row: Row) -> Conversation:
    """``text`` of "### Human: ...### Assistant: ..." turns, as the openassistant-guanaco rows."""
    whole = _text(row, "text")
    before, *parts = GUANACO_TURN.split(whole)
    if before.strip() or not parts:
        raise RowError("'text' does not begin with '### Human:'; its format may be text")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return Conversation(
        tuple(Message(SPEAKERS[speaker.lower()], said.strip()) for speaker, said in turns)
    )


def messages(row: Row) -> Conversation:
    """``messages``: a list of ``{role, content}``."""
    return _turns(row, "messages", "role", "content")


def sharegpt(row: Row) -> Conversation:
    """``conversations``: a list of ``{from, value}``."""
    return _turns(row, "conversations", "from", "value")


def _turns(row: Row, column: str, speaker: str, said: str) -> Conversation:
    turns = row.get(column)
    if turns is None:
        _text(row, column)  # raises, naming what was found instead
    if not isinstance(turns, list | tuple):
        raise RowError(f"'{column}' holds {type(turns).__name__}, expected a list of messages")
    converted = []
    for place, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise RowError(f"'{column}' item {place} is {type(turn).__name__}, expected a mapping")
        name = str(turn.get(speaker))
        if name not in SPEAKERS:
            raise RowError(
                f"'{column}' item {place} is from '{name}'; known: {', '.join(SPEAKERS)}"
            )
        converted.append(Message(SPEAKERS[name], _text(turn, said)))
    return Conversation(tuple(converted))


class Format(NamedTuple):
    """A family of rows: what turns one into a conversation, and the columns that give it away."""

    convert: Callable[[Row], Conversation]
    columns: frozenset[str]


FORMATS: dict[str, Format] = {
    "messages": Format(messages, frozenset({"messages"})),
    "sharegpt": Format(sharegpt, frozenset({"conversations"})),
    "alpaca": Format(alpaca, frozenset({"instruction", "output"})),
    "prompt-response": Format(prompt_response, frozenset({"prompt", "response"})),
    "prompt-completion": Format(prompt_completion, frozenset({"prompt", "completion"})),
    "question-answer": Format(question_answer, frozenset({"question", "answer"})),
    "input-output": Format(input_output, frozenset({"input", "output"})),
    "text": Format(text, frozenset({"text"})),
    "guanaco": Format(guanaco, frozenset({"text"})),
}
"""In order of preference: where several fit, the richer one wins."""


def guess_format(columns: Collection[str]) -> tuple[str, str | None]:
    """The format that these columns fit, and the runner-up if there is one.

    Raises:
        ConfigurationError: if no format fits.
    """
    fitting = [name for name, format in FORMATS.items() if format.columns <= set(columns)]
    if not fitting:
        found = ", ".join(f"'{column}'" for column in columns)
        known = "; ".join(f"{name}: {' + '.join(sorted(f.columns))}" for name, f in FORMATS.items())
        raise ConfigurationError(
            f"no format fits the columns {found}; rename them with columns: {{NEW: OLD}} to one of "
            f"({known})."
        )
    return fitting[0], fitting[1] if len(fitting) > 1 else None
