"""Every key of a run, given a null: it has a meaning there, or it is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from qlora_pl.cli import RunReader
from qlora_pl.errors import ConfigurationError
from qlora_pl.parsing import not_finite, unknown_keys
from qlora_pl.run_checks import check_run, complete, settings

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]


@pytest.fixture(scope="module")
def words(tiny_base: Path, rows_file: Path) -> list[str]:
    return [
        *("fit", "--model.model_name_or_path", str(tiny_base), "--model.lora.r", "4"),
        *("--data.sources", str(rows_file), "--trainer.accelerator", "cpu"),
    ]


@pytest.fixture(scope="module")
def reader(words: list[str]) -> RunReader:
    return RunReader(words)


def keys(parser: Any) -> Iterator[str]:
    for action in parser._actions:
        if action.dest not in ("help", "config", "print_config") and ".help" not in action.dest:
            yield action.dest


def nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def test_every_key_takes_null_for_something_or_refuses_it_by_name(
    reader: RunReader, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key passes a null on to where it is a TypeError."""
    monkeypatch.chdir(tmp_path)
    parser = reader._subcommand_parsers["fit"]
    refused, taken = [], []
    for key in keys(parser):
        Path("run.yaml").write_text(yaml.safe_dump(nested(key, None)))
        if problems := unknown_keys(parser, ["--config", "run.yaml"]):
            assert len(problems) == 1
            assert problems[0].startswith("run.yaml: ")
            assert key in problems[0]
            refused.append(key)
            continue
        run = complete(reader.parser.parse_args([*words, "--config", "run.yaml"]).fit)
        assert check_run(run) == [], key
        Trainer(**settings(run.trainer) | {"logger": False})
        taken.append(key)
    assert {"model", "trainer", "model.lora", "model.lora.r", "run.root", "data.sources"} <= {
        *refused
    }
    assert {"run.name", "data.val_sources", "trainer.max_epochs", "ckpt_path"} <= {*taken}
    assert len(refused) + len(taken) == len(list(keys(parser))) > 100


def test_a_null_in_a_flag_is_refused_like_one_in_a_file(reader: RunReader) -> None:
    parser = reader._subcommand_parsers["fit"]
    assert unknown_keys(parser, ["--run.name", "null", "--model.lora.alpha=1"]) == []
    assert unknown_keys(parser, ["--run.root", "null", "--model.lora.alpha=~"]) == [
        "run.root: null is no value for it (its default is 'runs'); write one, or remove the key.",
        "model.lora.alpha: null is no value for it (its default is 16.0); write one, or remove "
        "the key.",
    ]


def test_a_part_is_read_as_strictly_as_a_file(reader: RunReader, tmp_path: Path) -> None:
    """Seen from the file that names it; every problem is said with the file that holds it."""
    parser = reader._subcommand_parsers["fit"]
    (tmp_path / "gpu.yaml").write_text("max_stepz: 3\nmax_epochs: 2\n")
    (tmp_path / "run.yaml").write_text("trainer: gpu.yaml\nmodel: {lora: {r: null}}\n")
    mistake = f"{tmp_path}/gpu.yaml: 'trainer' has no key 'max_stepz'; did you mean 'max_steps'?"
    assert unknown_keys(parser, ["--trainer", str(tmp_path / "gpu.yaml")]) == [mistake]
    assert unknown_keys(parser, ["--config", str(tmp_path / "run.yaml")]) == [
        f"{tmp_path}/run.yaml: model.lora.r: null is no value for it (its default is 64); write "
        "one, or remove the key.",
        mistake,
    ]
    (tmp_path / "gpu.yaml").write_text("max_steps: 3\nmax_steps: 4\n")
    with pytest.raises(ConfigurationError, match=r"gpu.yaml, line 2: the key 'max_steps' stands"):
        unknown_keys(parser, ["--trainer", str(tmp_path / "gpu.yaml")])


def test_a_number_that_is_none_is_named_wherever_it_stands() -> None:
    values = {"a": {"b": [1.0, float("inf")]}, "c": float("nan"), "d": (1, "inf"), "e": None}
    assert list(not_finite(values)) == [
        "a.b: must be a finite number, got inf.",
        "c: must be a finite number, got nan.",
    ]
