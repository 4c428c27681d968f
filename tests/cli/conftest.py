"""A shell whose commands run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_pl.__main__ import main


@pytest.fixture
def type_in(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_base: Path,
    rows_file: Path,
) -> Callable[..., tuple[int, list[str]]]:
    """Types a command in an empty folder; returns its exit code and what it printed as errors.

    What it printed besides stays in ``type_in.told``.
    """
    monkeypatch.chdir(tmp_path)

    def run(*words: str, config: Any = None) -> tuple[int, list[str]]:
        words = tuple(
            w.replace("BASE", str(tiny_base)).replace("ROWS", str(rows_file)) for w in words
        )
        if config is not None:
            text = config if isinstance(config, str) else yaml.safe_dump(config)
            text = text.replace("BASE", str(tiny_base)).replace("ROWS", str(rows_file))
            (tmp_path / "run.yaml").write_text(text)
            words = (*words, "--config", "run.yaml")
        monkeypatch.setattr(sys, "argv", ["qlora-pl", *words])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        printed = capsys.readouterr()
        run.told = printed.out.splitlines()  # type: ignore[attr-defined]
        return code, printed.err.strip().splitlines()

    return run
