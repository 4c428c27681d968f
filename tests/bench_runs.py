"""``qlora-pl bench`` typed in a folder of a test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typed import type_words

Bench = Callable[..., tuple[int, str, str]]
FEW = ("--warmup", 1, "--steps", 2, "--profiled", 1)
SMALL = ("--tokens-per-micro", 128, "--seq", 64, "--r", 8)


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Bench:
    """Types the words after ``qlora-pl bench``: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: type_words(monkeypatch, capfd, "bench", *words)


def refused(result: tuple[int, str, str]) -> str:
    """What was said to a mistake: one sentence on standard error, exit code 2, no traceback."""
    code, out, err = result
    assert code == 2, (out, err)
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    return err
