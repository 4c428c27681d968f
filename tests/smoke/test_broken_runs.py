"""``qlora-pl smoke`` says of ten runs that are broken on purpose what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import save_base
from safetensors.torch import load_file, save_file
from typed import type_words

from qlora_pl.smoke.procedure import Procedure

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


@pytest.fixture
def settings(tiny_base: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A run without a mistake."""
    return {
        "model": {"model_name_or_path": str(tiny_base), "lora": {"r": 4}},
        "data": {"sources": str(rows_file), "template": "guanaco", "max_length": 64},
        "trainer": {"max_steps": 10},
        "run": {"root": str(tmp_path / "runs")},
    }


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    """A base of which only the body was saved, as ``AutoModel`` saves it."""
    folder = save_base(tmp_path / "body")
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _set(key: str, value: Any) -> Callable[[dict[str, Any], Path], None]:
    def change(settings: dict[str, Any], headless: Path) -> None:
        group = settings
        *parents, last = key.split(".")
        for name in parents:
            group = group.setdefault(name, {})
        group[last] = str(headless) if value == "HEADLESS" else value

    return change


BROKEN = {
    # name: what is broken, exit code, the step that finds it, and what its sentence says
    "template": (
        _set("data.template", "guanacco"),
        1,
        "template",
        "data.template: no template is called 'guanacco'",
    ),
    "target modules": (
        _set("model.lora.target_modules", ["q_proj", "value_proj"]),
        1,
        "base",
        "model.lora.target_modules: no linear module matches 'value_proj'; did you mean 'v_proj'?",
    ),
    "dtype": (
        _set("model.lora.dtype", "bf16"),
        2,
        "configuration",
        "model.lora.dtype",
    ),
    "length": (
        _set("data.max_length", 16),
        1,
        "data",
        "data.max_length",
    ),
    "stop token": (
        _set(
            "data.template",
            {"question": "{content}", "answer": "{content}", "stop": "<|im_start|>"},
        ),
        1,
        "template",
        "data.template: 'custom' ends answers with '<|im_start|>'",
    ),
    "optimizer name": (
        _set("model.optimizer.name", "paged_adamw_32bits"),
        2,
        "configuration",
        "model.optimizer.name",
    ),
    "path": (
        _set("data.sources", "nowhere/rows.jsonl"),
        2,
        "configuration",
        "data.sources: no file 'nowhere/rows.jsonl'",
    ),
    "strategy": (
        _set("trainer.strategy", "fsdp"),
        2,
        "configuration",
        "trainer.strategy: 'fsdp' cannot flatten packed 4-bit bytes",
    ),
    "data column": (
        lambda settings, _: settings["data"].update(
            sources={"path": settings["data"]["sources"], "columns": {"response": "answer"}}
        ),
        1,
        "data",
        "answer",
    ),
    "base without a head": (
        _set("model.model_name_or_path", "HEADLESS"),
        1,
        "base",
        "hold no 'lm_head.weight', the output head",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_fails_in_its_step_with_the_right_sentence(
    name: str,
    settings: dict[str, Any],
    headless: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, code, step, sentence = BROKEN[name]
    change(settings, headless)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(Procedure, "_train", _must_not_come)
    found, out, _ = type_words(
        monkeypatch, capsys, "smoke", "--config", path, "--offline", "--json"
    )
    record = json.loads(out)
    assert found == record["exit_code"] == code
    failed = [its for its in record["steps"] if its["status"] == "failed"]
    assert [its["step"] for its in failed] == [step]
    assert sentence in failed[0]["said"]
    assert failed[0]["said"].count(". ") == 0  # one sentence
    assert failed[0]["more"] == []
    assert "qlora-pl-smoke-" not in failed[0]["said"]  # the user's names, not ours
    assert not (tmp_path / "runs").exists()


def _must_not_come(*_: Any) -> None:
    raise AssertionError("a broken run was trained")


MISTAKES = {
    # name: the words after smoke, where FILE is a run without a mistake; what is said
    "a misspelt key": (
        "--config FILE --data.max_lenght 64",
        "'data' has no key 'max_lenght'; did you mean 'max_length'?",
    ),
    "a batch that its devices cannot share": (
        "--config FILE --data.global_batch_size 8 --trainer.devices 3",
        "data.global_batch_size: 8",
    ),
    "a cosine without an end": (
        "--config FILE --model.schedule.name cosine --trainer.max_time 01:00:00:00"
        " --trainer.max_steps -1",
        "model.schedule: cosine",
    ),
    "an impossible value": ("--config FILE --model.lora.r -4", "model.lora.r"),
    "a misspelt flag": ("--ofline", "did you mean '--offline'?"),
    "no words": ("", "--config"),
    "a file alone": ("FILE", "--config"),
    "a file that is missing": ("--config mein.yaml", "no file 'mein.yaml'"),
    "a flag without a file": ("--config", "--config: name a file after it."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_words_is_one_sentence_and_nothing_is_tried(
    name: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    words, sentence = MISTAKES[name]
    typed = [str(path) if word == "FILE" else word for word in words.split()]
    code, out, said = type_words(monkeypatch, capsys, "smoke", *typed)
    assert code == 2
    assert out == ""
    assert sentence in said
    assert said.startswith("qlora-pl: ")
    assert said.count("\n") == 1


def test_a_disk_that_is_almost_full_is_told_before_anything_is_written(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50e6))
    monkeypatch.setattr(Procedure, "_train", _must_not_come)
    monkeypatch.setattr("qlora_pl.smoke.procedure.make_base", _must_not_come)
    words = ("smoke", "--config", path, "--offline", "--json")
    code, out, _ = type_words(monkeypatch, capsys, *words)
    (failed,) = [step for step in json.loads(out)["steps"] if step["status"] == "failed"]
    assert (code, failed["step"]) == (1, "base")
    assert "0.1 GB free; name a folder on another disk in TMPDIR" in failed["said"]


def test_help_says_what_it_does_and_which_flags_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, said = type_words(monkeypatch, capsys, "smoke", "--help")
    assert (code, said) == (0, "")
    for word in ("--config", "--offline", "--keep", "--json", "Exit code"):
        assert word in out


def test_the_temporary_folder_is_gone_unless_it_is_to_be_kept(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings["data"]["template"] = "none"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    words = ("smoke", "--config", path, "--offline")
    assert type_words(monkeypatch, capsys, *words)[0] == 1
    assert list(place.iterdir()) == []
    _, _, said = type_words(monkeypatch, capsys, *words, "--keep")
    (kept,) = place.iterdir()
    assert str(kept) in said
    assert (kept / "base/model.safetensors").is_file()
