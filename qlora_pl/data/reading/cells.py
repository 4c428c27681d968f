"""One cell of a row -> text, or a sentence about why it is none.

Nothing is turned into text in silence: a number, a list or half of a surrogate pair would train
without a word, and is a sign that another column was meant.
"""

from __future__ import annotations

import reprlib
from typing import Any

from qlora_pl.data.reading.places import Row

OTHER_FORMAT = "Set another format, or rename the columns with columns: {NEW: OLD}"


class RowError(ValueError):
    """A row is not what its format says; whoever knows the file and the row adds them.

    Args:
        clause: What is wrong, without a full stop.
        remedy: What to do, without a full stop.
    """

    def __init__(self, clause: str, remedy: str = OTHER_FORMAT) -> None:
        super().__init__(clause)
        self.remedy = remedy


def text_of(row: Row, column: str, default: str | None = None) -> str:
    """The text in a column.

    Args:
        row: The record.
        column: Its column.
        default: What a column that is absent or null stands for; None: it must not be.

    Raises:
        RowError: if there is no text, or one that no tokenizer takes.
    """
    value = row.get(column)
    if value is None:
        if default is not None:
            return default
        found = ", ".join(f"{name!r:.60}" for name in row if row[name] is not None) or "nothing"
        what = f"'{column}' is null" if column in row else f"no '{column}' field"
        raise RowError(f"{what}; found {found}")
    if not isinstance(value, str):
        raise RowError(
            f"'{column}' holds {type(value).__name__} {quote(value)}, expected text", _remedy(value)
        )
    _refuse_broken_text(value, column)
    return value


def quote(value: Any) -> str:
    """A value as it would be written, in part if it is long."""
    return f"{reprlib.repr(value):.60}"


def _remedy(value: Any) -> str:
    if isinstance(value, bool):
        return 'Write the word that is meant, in quotes ("yes", "true"), or name another column'
    if isinstance(value, int | float):
        return "Write the number in quotes, or name another column with columns: {NEW: OLD}"
    if isinstance(value, bytes):
        return "Store the column as text (UTF-8) rather than as bytes"
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return "If these are messages, rename it with columns: {messages: OLD}; else join them"
    if isinstance(value, list | tuple):
        return "Join its items to one text, or give each of them a row"
    return "Name the part of it that is meant, as a column of its own"


def _refuse_broken_text(value: str, column: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may spell one; no tokenizer takes it
        raise RowError(
            f"'{column}' holds half of a surrogate pair (character {error.start + 1})",
            "Remove that character; a program cut the text in the middle of an emoji",
        ) from error
    if (where := value.find("\0")) >= 0:
        raise RowError(
            f"'{column}' holds a NUL character (character {where + 1})",
            "Remove it; the file may be damaged, or not be text",
        )
