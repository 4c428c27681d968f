"""Types a command as a user does, in this process."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from qlora_pl.__main__ import main


def type_words(
    monkeypatch: pytest.MonkeyPatch, captured: Any, *words: object
) -> tuple[int, str, str]:
    """Run ``qlora-pl`` with words; exit code, standard output, standard error.

    Args:
        monkeypatch: The test's.
        captured: ``capsys`` or ``capfd``.
        words: After ``qlora-pl``.
    """
    monkeypatch.setattr(sys, "argv", ["qlora-pl", *map(str, words)])
    captured.readouterr()
    try:
        code = main()
    except SystemExit as exit:
        code = int(exit.code or 0)
    printed = captured.readouterr()
    return code, printed.out, printed.err
