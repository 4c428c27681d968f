"""The words of conversations: what two of them are compared by, and which scripts they are in."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from qlora_pl.data.conversation import Conversation

UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Scripts that put no spaces between words; each of their characters counts as one."""


def normalized(text: str) -> str:
    """Without what often differs between copies: case, kinds of spaces, compatibility forms."""
    if not text.isascii():
        text = UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text))
    return " ".join(text.casefold().split())


def wording(conversation: Conversation) -> str:
    """What everybody says, normalised; system messages, which many rows share, are left out."""
    said = [
        text
        for message in conversation.messages
        if message.role != "system"
        for text in (message.content, message.context)
    ]
    return normalized("\n".join(said))


def prompt_wording(conversation: Conversation) -> str:
    """The same of all before the last answer; empty for plain text."""
    return "" if conversation.is_plain_text else wording(conversation.prompt)


# -- scripts ---------------------------------------------------------------------------------------

SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "Latin": ((0x41, 0x24F), (0x1E00, 0x1EFF)),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F),),
    "Armenian": ((0x530, 0x58F),),
    "Hebrew": ((0x590, 0x5FF),),
    "Arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)),
    "Devanagari": ((0x900, 0x97F),),
    "Bengali": ((0x980, 0x9FF),),
    "Gurmukhi": ((0xA00, 0xA7F),),
    "Gujarati": ((0xA80, 0xAFF),),
    "Tamil": ((0xB80, 0xBFF),),
    "Telugu": ((0xC00, 0xC7F),),
    "Kannada": ((0xC80, 0xCFF),),
    "Malayalam": ((0xD00, 0xD7F),),
    "Sinhala": ((0xD80, 0xDFF),),
    "Thai": ((0xE00, 0xE7F),),
    "Lao": ((0xE80, 0xEFF),),
    "Burmese": ((0x1000, 0x109F),),
    "Georgian": ((0x10A0, 0x10FF),),
    "Ethiopic": ((0x1200, 0x139F),),
    "Khmer": ((0x1780, 0x17FF),),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "Kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "Han": ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
}
"""Unicode blocks of each script, first and last code point (The Unicode Standard, Blocks.txt)."""
OTHER = "other"
_CHARACTERS_AT_A_TIME = 1 << 22


def count_letters(texts: Iterable[str]) -> dict[str, int]:
    """Letters of each script, most frequent first."""
    names = [*SCRIPTS, OTHER]
    table = _script_table()
    counts = np.zeros(len(names) + 1, np.int64)
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size > _CHARACTERS_AT_A_TIME:
            counts += _count("".join(waiting), table, len(counts))
            waiting, size = [], 0
    counts += _count("".join(waiting), table, len(counts))
    found = {name: int(count) for name, count in zip(names, counts, strict=False) if count}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _count(text: str, table: np.ndarray, size: int) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.bincount(table[codes], minlength=size)


def _script_table() -> np.ndarray:
    """``(0x110000,)`` uint8: the place of each letter's script; the last one is of no letter."""
    table = np.full(0x110000, len(SCRIPTS) + 1, np.uint8)
    is_letter = [code for code in range(0x20000) if chr(code).isalpha()]
    table[is_letter] = len(SCRIPTS)
    for place, blocks in enumerate(SCRIPTS.values()):
        for first, last in blocks:
            block = table[first : last + 1]
            block[(block == len(SCRIPTS)) | (first >= 0x20000)] = place
    return table
