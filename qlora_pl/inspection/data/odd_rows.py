"""Rows that are worth a look: nothing here is forbidden, and most of it is a mistake somewhere.

Each kind has a definition that the page prints, and is found in every row, not in a sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.reading.places import Place
from qlora_pl.inspection.data.wording import normalized

SHOWN = 8
"""Rows of a kind that are named; the others are counted."""
CONTEXT = 30
"""Characters shown on each side of what was found."""
SHORT = 2

# UTF-8 that was read as Windows-1252 or Latin-1: what the first bytes of a character become.
MOJIBAKE = re.compile(
    "\ufffd|[\u00c2\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192"
    "\u02c6\u02dc\u2013-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]"
    "|\u00e2(?:\u20ac|\u0080)[\u0080-\u00bf\u0152-\u0178\u02c6\u02dc\u2013-\u2022\u2026\u2122]"
    "|\u00ef\u00bb\u00bf"
)
REPEATED = re.compile(r"([^\s\-=_*#.~+|/\\`:<>─━═])\1{19,}")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")
ENTITY = re.compile(r"&(?:amp|lt|gt|quot|nbsp|apos|#\d{2,5}|#x[0-9a-fA-F]{2,4});")

Find = Callable[[Conversation], str | None]
"""What is odd about a conversation, in a few words or quoted; None: nothing of this kind."""


class OddKind(NamedTuple):
    """What was found of one kind."""

    name: str
    definition: str
    num_rows: int
    examples: list[tuple[Place, str]]


def _short_answer(conversation: Conversation) -> str | None:
    for answer in _answers(conversation):
        if len(answer.strip()) <= SHORT:
            return answer.strip()
    return None


def _echo(conversation: Conversation) -> str | None:
    for asked, answer in pairwise(conversation.messages):
        is_close = 2 * len(asked.content) >= len(answer.content)  # most need no normalising
        if answer.role != "assistant" or not is_close or not answer.content:
            continue
        if normalized(asked.content) == normalized(answer.content):
            return answer.content[: 2 * CONTEXT]
    return None


def _empty_question(conversation: Conversation) -> str | None:
    questions = [m for m in conversation.messages if m.role == "user"]
    is_empty = any(not m.content.strip() and not m.context.strip() for m in questions)
    return "a question without text" if is_empty else None


def _answers(conversation: Conversation) -> Iterator[str]:
    return (m.content for m in conversation.messages if m.role == "assistant")


def _matching(pattern: re.Pattern[str], beyond_ascii: bool = False) -> Find:
    """Finds a pattern in any message; most texts need no search for what is beyond ASCII."""

    def find(conversation: Conversation) -> str | None:
        for message in conversation.messages:
            for text in (message.content, message.context):
                if beyond_ascii and text.isascii():
                    continue
                if found := pattern.search(text):
                    start = max(found.start() - CONTEXT, 0)
                    return text[start : min(found.end(), found.start() + CONTEXT) + CONTEXT]
        return None

    return find


KINDS: dict[str, tuple[str, Find]] = {
    "very short answer": (
        f"an answer of at most {SHORT} characters, spaces at its ends aside",
        _short_answer,
    ),
    "answer repeats the question": (
        "an answer that is the message before it, case and spaces aside",
        _echo,
    ),
    "empty question": ("a user's message of white space alone", _empty_question),
    "repeated character": (
        "the same character 20 times in a row or more, spaces and ruled lines aside",
        _matching(REPEATED),
    ),
    "damaged characters": (
        "the replacement character U+FFFD, or UTF-8 that was read as another encoding",
        _matching(MOJIBAKE, beyond_ascii=True),
    ),
    "control characters": (
        "a character below U+0020 other than tab and line ends, or one of U+007F to U+009F",
        _matching(CONTROL),
    ),
    "text direction overridden": (
        "an invisible character that changes the order in which text is shown",
        _matching(DIRECTION, beyond_ascii=True),
    ),
    "HTML entities": ("what web pages write for &, <, > and others", _matching(ENTITY)),
}
CONTROL_TOKEN = "control token in the text"


def find_odd_rows(
    documents: Iterable[tuple[Place, Conversation]], control_tokens: re.Pattern[str] | None
) -> list[OddKind]:
    """Every kind of which there is a row, the most frequent first.

    Args:
        documents: Conversations with their places.
        control_tokens: Finds those of the tokenizer in a text.
    """
    kinds = dict(KINDS)
    if control_tokens is not None:
        kinds[CONTROL_TOKEN] = (
            "a message that spells a control token of this tokenizer; trained as ordinary text",
            _matching(control_tokens),
        )
    counts = dict.fromkeys(kinds, 0)
    examples: dict[str, list[tuple[Place, str]]] = {name: [] for name in kinds}
    for place, conversation in documents:
        for name, (_, find) in kinds.items():
            found = find(conversation)
            if found is None:
                continue
            counts[name] += 1
            if len(examples[name]) < SHOWN:
                examples[name].append((place, found))
    found_kinds = [
        OddKind(name, kinds[name][0], counts[name], examples[name])
        for name in kinds
        if counts[name]
    ]
    return sorted(found_kinds, key=lambda kind: -kind.num_rows)
