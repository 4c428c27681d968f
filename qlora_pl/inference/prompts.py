"""What is asked: words of the command line, a file, or standard input -> numbered prompts.

A broken line is told by its number before any long work starts, since a file is read whole first.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qlora_pl.data.conversation import ROLES, Conversation, Message
from qlora_pl.errors import DatasetFormatError

STANDARD_INPUT = "-"
FIELDS = ("prompt", "instruction", "messages")
"""Of which a row of a file has one."""
SUFFIXES = (".jsonl", ".json", ".csv", ".txt")


@dataclass(frozen=True)
class Prompt:
    """One thing to ask."""

    row: int
    """Its number, from 0; seeds what is drawn at random."""
    conversation: Conversation
    """Up to and with the question."""
    given: Mapping[str, Any]
    """The row it came from, as it was."""
    where: str
    """File and line, for messages."""

    @property
    def question(self) -> str:
        """The last thing that was said."""
        return self.conversation.messages[-1].content


def read_prompts(
    words: Sequence[str], file: str | None, system: str | None, skips: bool, stdin: TextIO
) -> tuple[list[Prompt], list[str]]:
    """Every prompt in order, and a sentence for each line that was skipped.

    Args:
        words: Questions from the command line.
        file: A file by its suffix (``SUFFIXES``; a text file has a question a line), or ``-`` for
            standard input: rows of JSON if it begins with a brace, else one question.
        system: A system message for those that have none.
        skips: Whether lines that cannot be read are left out.
        stdin: Standard input.

    Raises:
        DatasetFormatError: for the first broken line, or if there is nothing to ask.
    """
    rows: list[tuple[str, Any]] = [(f"--prompt {n}", word) for n, word in enumerate(words, start=1)]
    if file is not None:
        rows += _rows_of(file, stdin)
    prompts: list[Prompt] = []
    skipped: list[str] = []
    for number, (where, row) in enumerate(rows):
        problem, conversation = conversation_of(row, system)
        if conversation is not None:
            given = row if isinstance(row, Mapping) else {"prompt": row}
            prompts.append(Prompt(number, conversation, given, where))
        elif skips:
            skipped.append(f"{where}: {problem}; left out.")
        else:
            raise DatasetFormatError(
                f"{where}: {problem}; correct it, or leave such lines out with --on-error skip."
            )
    if not prompts:
        raise DatasetFormatError(
            "Nothing is asked: give --prompt TEXT, --prompts FILE, or text on standard input."
        )
    return prompts, skipped


def _rows_of(file: str, stdin: TextIO) -> list[tuple[str, Any]]:
    if file == STANDARD_INPUT:
        text = stdin.read()
        if text.lstrip().startswith("{"):
            return _json_lines("standard input", text)
        return [("standard input", text.strip())] if text.strip() else []
    path = Path(file).expanduser()
    if path.suffix not in SUFFIXES:
        raise DatasetFormatError(
            f"--prompts: '{file}' is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DatasetFormatError(f"--prompts: no file '{file}'.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetFormatError(f"--prompts: '{file}' cannot be read ({error}).") from error
    if path.suffix == ".txt":
        lines = enumerate(text.splitlines(), start=1)
        return [(f"{file}, line {number}", line) for number, line in lines if line.strip()]
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return [(f"{file}, line {reader.line_num}", row) for row in reader]
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return [(f"{file}, row {n}", row) for n, row in enumerate(_parse_list(file, text), start=1)]
    return _json_lines(file, text)


def _json_lines(file: str, text: str) -> list[tuple[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row: Any = json.loads(line)
            except ValueError as error:
                row = error
            rows.append((f"{file}, line {number}", row))
    return rows


def _parse_list(file: str, text: str) -> Iterable[Any]:
    try:
        rows: list[Any] = json.loads(text)
    except ValueError as error:
        raise DatasetFormatError(f"{file}: not JSON ({error}).") from error
    return rows


def conversation_of(row: Any, system: str | None) -> tuple[str, Conversation | None]:
    """What is wrong with a row, in a clause, or what it asks.

    Args:
        row: A question, or a mapping with one of ``FIELDS``.
        system: A system message, if it has none.
    """
    if isinstance(row, ValueError):
        return f"not JSON ({row})", None
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        return f"expected an object with one of {', '.join(FIELDS)}", None
    found = [name for name in FIELDS if row.get(name)]
    if len(found) != 1:
        has = " and ".join(found) or "none of them"
        return f"expected one of {', '.join(FIELDS)}, and it has {has}", None
    if found == ["messages"]:
        return _of_messages(row["messages"], system)
    question, context = row[found[0]], row.get("input") or ""
    if not isinstance(question, str) or not isinstance(context, str) or not question.strip():
        return f"its {found[0]} is no text", None
    first = (Message("system", system),) if system else ()
    return "", Conversation((*first, Message("user", question, context)))


def _of_messages(messages: Any, system: str | None) -> tuple[str, Conversation | None]:
    read: list[Message] = []
    for number, turn in enumerate(messages if isinstance(messages, list) else [None], start=1):
        is_turn = isinstance(turn, Mapping) and turn.get("role") in ROLES
        if not is_turn or not isinstance(turn.get("content"), str):
            roles = ", ".join(ROLES)
            return f"message {number} has no content, or no role of {roles}", None
        read.append(Message(turn["role"], turn["content"]))
    if system and read[0].role != "system":
        read.insert(0, Message("system", system))
    expected = "user"
    for number, turn in enumerate(read, start=1):
        if turn.role == "system" and number == 1:
            continue
        if turn.role != expected:
            return f"message {number} is from '{turn.role}', expected '{expected}'", None
        expected = "assistant" if expected == "user" else "user"
    if read[-1].role != "user":
        return "it ends with an answer, so there is nothing to ask", None
    return "", Conversation(tuple(read))
