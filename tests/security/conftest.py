"""What every attempt starts from: a place where hidden code would show, and a shell of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from typed import type_words

from security.attempts import Type


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The folder that hidden code would make."""
    return tmp_path / "the-code-was-run"


@pytest.fixture
def type_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Type:
    """Types a command in an empty folder, with a cache of its own and a yes for every question."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    def run(*words: object) -> tuple[int, str]:
        code, _, said = type_words(monkeypatch, capsys, *words)
        return code, said

    return run
