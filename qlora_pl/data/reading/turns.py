"""Rows that hold several turns: a list of messages, or one text with markers between the turns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_pl.data.conversation import Conversation, Message, Role
from qlora_pl.data.reading.cells import RowError, quote, text_of
from qlora_pl.data.reading.places import Row

# The names that speakers go by in published datasets; upper and lower case are the same.
SPEAKERS: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
TOOLS = frozenset(
    {
        *("tool", "tool_call", "tool_response", "tool_result", "observation", "ipython"),
        *("function", "function_call", "function_response", "function-call", "function-response"),
    }
)
"""Speakers that are programs: what they say is not trained here."""
WITHOUT_TOOLS = (
    "Leave conversations with calls of tools out: only system, user and assistant turns are trained"
)
SPEAKER_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")


def messages(row: Row) -> Conversation:
    """``messages``: a list of ``{role, content}``, each perhaps with a ``weight`` or ``train``."""
    return Conversation(tuple(_read_turns(row, "messages", "role", "content")))


def sharegpt(row: Row) -> Conversation:
    """``conversations``: a list of ``{from, value}``, likewise."""
    return Conversation(tuple(_read_turns(row, "conversations", "from", "value")))


def vicuna(row: Row) -> Conversation:
    """As ``sharegpt``, without an answer that opens the row and a question that ends it.

    Pages of a long conversation were shared apart, so that a row may begin or end in its middle.
    """
    turns = _read_turns(row, "conversations", "from", "value")
    start = 1 if turns and turns[0].role == "system" else 0
    while len(turns) > start and turns[start].role == "assistant":
        del turns[start]
    while turns and turns[-1].role == "user":
        turns.pop()
    if len(turns) <= start:
        raise RowError("no question with an answer is left of it", "Remove the row")
    return Conversation(tuple(turns))


def _read_turns(row: Row, column: str, speaker: str, said: str) -> list[Message]:
    """The messages in a column; both pairs of keys are understood, whatever the format."""
    turns = row.get(column)
    if turns is None:
        text_of(row, column)  # raises, naming what was found instead
    if isinstance(turns, str) and turns.lstrip()[:1] == "[":
        raise RowError(
            f"'{column}' holds a list that was written as text, expected a list of messages",
            "Store the rows as JSON lines (.jsonl) or Parquet, which can hold lists",
        )
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
        raise RowError(f"'{column}' holds {type(turns).__name__}, expected a list of messages")
    return [
        _read_turn(turn, f"'{column}' item {number}", speaker, said)
        for number, turn in enumerate(turns, start=1)
    ]


def _read_turn(turn: Any, item: str, speaker: str, said: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{item} is {type(turn).__name__}, expected a mapping")
    name = turn.get(_first_key(turn, SPEAKER_KEYS, speaker))
    if name is None:
        raise RowError(f"{item} has no '{speaker}'", "Say who speaks, or remove the row")
    if str(name).lower() in TOOLS or turn.get("tool_calls"):
        raise RowError(f"{item} is from '{name}' and calls a tool or answers for it", WITHOUT_TOOLS)
    if str(name).lower() not in SPEAKERS:
        raise RowError(
            f"{item} is from '{quote(name)[1:-1]}'; known: {', '.join(SPEAKERS)}",
            "Rename the speaker, or remove the row",
        )
    try:
        text = text_of(turn, _first_key(turn, TEXT_KEYS, said))
        return Message(SPEAKERS[str(name).lower()], text, weight=_weight(turn))
    except RowError as error:
        raise RowError(f"{item}: {error}", error.remedy) from error


def _first_key(turn: Mapping[str, Any], keys: Sequence[str], usual: str) -> str:
    """The first of these keys that the message has; the usual one if it has none."""
    return next((key for key in (usual, *keys) if turn.get(key) is not None), usual)


def _weight(turn: Mapping[str, Any]) -> float:
    """What the turn's tokens count: its ``weight``, or 1 and 0 for its ``train``; 1 if unsaid."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and train is not None:
        raise RowError("it has both 'weight' and 'train'", "Keep one of them")
    if train is not None:
        if not isinstance(train, bool):
            raise RowError(f"'train' holds {quote(train)}", "Write true or false, without quotes")
        return float(train)
    if weight is None:
        return 1.0
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight < 0:
        raise RowError(f"'weight' holds {quote(weight)}", "Write a number of 0 or more")
    return float(weight)


# -- one text with markers -----------------------------------------------------------------------

GUANACO_TURN = re.compile(r"### (Human|Assistant):")
CHIP2_TURN = re.compile(r"(?:^|\n)<(human|bot)>:")
MARKERS = {"guanaco": GUANACO_TURN, "chip2": CHIP2_TURN}
"""Formats that are never guessed, by what their texts begin with."""
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def guanaco(row: Row) -> Conversation:
    """``text`` of "### Human: ...### Assistant: ..." turns, as the openassistant-guanaco rows."""
    return Conversation(tuple(_cut(row, "text", GUANACO_TURN, "### Human:")))


def chip2(row: Row) -> Conversation:
    """``text`` of "<human>: ..." and "<bot>: ..." lines, as the rows of OIG; every turn is kept."""
    return Conversation(tuple(_joined(_cut(row, "text", CHIP2_TURN, "<human>:"), "\n")))


def hh_rlhf(row: Row) -> Conversation:
    """``chosen``, with "Human:" and "Assistant:" after empty lines, as the rows of hh-rlhf."""
    return Conversation(tuple(_joined(_cut(row, "chosen", HH_TURN, "Human:"), "\n\n")))


def _cut(row: Row, column: str, marker: re.Pattern[str], opening: str) -> list[Message]:
    before, *parts = marker.split(text_of(row, column))
    if before.strip() or not parts:
        raise RowError(f"'{column}' does not begin with '{opening}'; its format may be text")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [Message(SPEAKERS[speaker.lower()], said.strip()) for speaker, said in turns]


def _joined(turns: Sequence[Message], joint: str) -> list[Message]:
    """What one speaker says in several turns on end is one turn."""
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            whole = joint.join(text for text in (merged[-1].content, turn.content) if text)
            merged[-1] = Message(turn.role, whole)
        else:
            merged.append(turn)
    return merged
