"""What every attempt starts from: a place where hidden code would show, and a shell of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qlora_pl.__main__ import main
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
        monkeypatch.setattr(sys, "argv", ["qlora-pl", *map(str, words)])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        printed = capsys.readouterr()
        return code, printed.err

    return run
