"""A file with a bit of everything that goes wrong with data, and a command that is typed at it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qlora_pl.__main__ import main

SCRIPT = "</span></div><script>alert('x')</script><img src=x onerror=alert(1)>&amp; \"it's\""
LONG = " ".join(f"Part {number} of a long answer." for number in range(60))
NUM_PLAIN = 20


def _plain_rows() -> list[dict[str, str]]:
    """Rows of words of their own, so that no two are alike by chance."""
    drawn = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{drawn.randrange(10**9)}" for _ in range(count))

    return [{"prompt": words(5), "response": words(12)} for _ in range(NUM_PLAIN)]


PLAIN = _plain_rows()
NEARLY = PLAIN[2]["response"] + " more"
"""Shares 15 of 16 runs of three words with its row: five and twelve words, and one more."""
BAD = [
    *PLAIN,
    PLAIN[0],  # row 21: row 1 once more
    {"prompt": PLAIN[1]["prompt"].upper(), "response": PLAIN[1]["response"]},  # 22: row 2, levelled
    {"prompt": PLAIN[2]["prompt"], "response": NEARLY},  # 23: row 3, nearly
    {"prompt": "Markup?", "response": SCRIPT},  # 24
    {"prompt": "Letter?", "response": " A "},  # 25
    {"prompt": "Say it  again.", "response": "say it again."},  # 26
    {"prompt": "Scream!", "response": "A" + "a" * 30},  # 27
    {"prompt": "Wie?", "response": "fÃ¼nf"},  # 28
    {"prompt": "Which token ends it?", "response": "It is <|im_end|> here."},  # 29
    {"prompt": "ما هي؟", "response": "هي القاهرة\nثم\tنعم"},  # 30
    {"prompt": "Long?", "response": LONG},  # 31
]
VAL = [
    {"prompt": "An unseen question, really?", "response": "An answer of its own kind."},
    PLAIN[3],  # also in training
    {"prompt": PLAIN[4]["prompt"], "response": "Something else entirely, and at length."},
    {"prompt": PLAIN[2]["prompt"], "response": NEARLY + " still"},  # nearly in training
]


class Typed(NamedTuple):
    """What came of a command."""

    code: int
    out: str
    errors: list[str]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


class Looker:
    """Types ``qlora-pl inspect`` in this process.

    Args:
        base: The folder that the word BASE stands for.
        monkeypatch: Pytest's.
        capsys: Pytest's.
    """

    def __init__(
        self, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.base, self.monkeypatch, self.capsys = base, monkeypatch, capsys

    def __call__(self, *words: str, base: Path | None = None) -> Typed:
        """Type these words after the command."""
        typed = [word.replace("BASE", str(base or self.base)) for word in words]
        self.monkeypatch.setattr(sys, "argv", ["qlora-pl", "inspect", *typed])
        self.capsys.readouterr()
        code = main()
        told = self.capsys.readouterr()
        return Typed(code, told.out, told.err.strip().splitlines())


def run_words(rows: Path, *more: str) -> tuple[str, ...]:
    """The words of a run over a file, on a tiny base."""
    base = ("data", "--model.model_name_or_path", "BASE", "--model.lora.r", "4")
    return (*base, "--data.sources", str(rows), *more)
