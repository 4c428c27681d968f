"""Fixtures: one trained adapter, three steps over a tiny base, multiplied in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_runs import fit
from conftest import save_base
from typed import type_words

from qlora_pl.inference.loading import Model, load
from qlora_pl.inference.source import ModelChoice, resolve_source

CPU = torch.device("cpu")
Type = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def run(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose adapter answers otherwise than its base."""
    folder = tmp_path_factory.mktemp("trained")
    fit(folder, tiny_base, rows_file, r=8, alpha=64.0)
    return folder


@pytest.fixture(scope="session")
def adapter(run: Path) -> Path:
    """Its adapter folder."""
    return run / "adapter"


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes, other weights."""
    return save_base(tmp_path_factory.mktemp("other") / "tiny-llama", seed=1)


@pytest.fixture(scope="session")
def model(adapter: Path) -> Model:
    """What answers."""
    return load(resolve_source(ModelChoice(adapter=(str(adapter),))), CPU)


@pytest.fixture
def type_in(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> Type:
    """Types a command in an empty folder: exit code, standard output, standard error and log."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*words: object) -> tuple[int, str, str]:
        caplog.clear()
        code, out, said = type_words(monkeypatch, capsys, *words)
        return code, out, said + caplog.text

    return run
