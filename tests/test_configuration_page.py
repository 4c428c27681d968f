"""docs/configuration.md says of every key what the parser of a run does with it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_pl.cli import TRAINER_DEFAULTS, RunReader
from qlora_pl.data.reading.formats import FORMATS
from qlora_pl.data.reading.sources import RowSources, SourceConfig
from qlora_pl.errors import ConfigurationError
from qlora_pl.key_reference import OWN_WORDS, page
from qlora_pl.run_checks import DEFAULT_EPOCHS, complete

PAGE = (Path(__file__).parent.parent / "docs/configuration.md").read_text()
BASE, ROWS = ["--model.model_name_or_path", "BASE"], ["--data.sources", "ROWS"]

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # building the parser imports everything


def rows(text: str) -> list[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each row of the page's tables of keys."""
    return re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.*) \|$", text, re.MULTILINE)


SECTIONS = re.split(r"^##+ ", PAGE, flags=re.MULTILINE)
ABOUT_SOURCES = next(section for section in SECTIONS if section.startswith("A source"))
KEYS = rows(PAGE.replace(ABOUT_SOURCES, ""))


@pytest.fixture(scope="module")
def reader() -> RunReader:
    return RunReader(["fit", *BASE, *ROWS])


@pytest.fixture
def parse(reader: RunReader) -> Callable[..., Any]:
    """The run that words after ``qlora-pl fit`` come to."""
    return lambda *words: reader.parser.parse_args(["fit", *words]).fit


def plain(value: Any) -> Any:
    """A parsed value as YAML would read it back."""
    if isinstance(value, RowSources):
        return value.plain()
    return list(value) if isinstance(value, tuple) else value


def test_the_page_is_what_make_docs_writes() -> None:
    assert page() + "\n" == PAGE, "write it anew with: make docs"


def test_every_key_of_a_run_is_on_the_page_once(reader: RunReader) -> None:
    """Against the parser's actions, whatever the generator thinks of them."""
    parser: Any = reader._subcommand_parsers["fit"]
    taken = {action.dest for action in parser._actions if action.option_strings}
    taken -= {"help", "config", "print_config", *parser.groups}
    ours = {key for key in taken if not key.startswith("trainer.")}
    names = [key for key, *_ in KEYS]
    assert sorted(names) == sorted(ours | {f"trainer.{key}" for key in TRAINER_DEFAULTS})


def test_a_default_is_what_a_run_gets(reader: RunReader) -> None:
    """Against a parsed run of which only base and rows are named."""
    run = reader.config.fit
    shown = {key: default.strip("`") for key, _, default, _ in KEYS}
    required = [key for key, default in shown.items() if default == "must be set"]
    assert required == ["model.model_name_or_path", "data.sources"]
    assert {key: yaml.safe_load(shown[key]) for key in shown if key not in required} == {
        key: plain(run[key]) for key in shown if key not in required
    }


@pytest.mark.parametrize(
    ("words", "key"), [(ROWS, "model.model_name_or_path"), (BASE, "data.sources")]
)
def test_what_must_be_set_must_be_set(
    parse: Callable[..., Any], words: list[str], key: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key}: must be set"):
        parse(*words)


def test_every_key_has_a_meaning_in_words_for_somebody_who_writes_yaml() -> None:
    for key, kind, _, meaning in [*KEYS, *rows(ABOUT_SOURCES)]:
        assert len(meaning.split()) >= 4, f"{key} has no meaning"
        assert meaning.endswith("."), f"{key}: '{meaning}' is no sentence"
        assert not re.search(r"\b(None|True|False)\b|``", meaning), f"{key}: {meaning}"
        assert not re.search(r"typing|class|Union|None|\|", kind), f"{key}: {kind}"


def test_what_is_said_in_our_words_is_lightnings_and_nothing_else() -> None:
    """Meanings of this project's keys are written once, in the docstrings."""
    lightnings = {"seed_everything", "ckpt_path", *(f"trainer.{key}" for key in TRAINER_DEFAULTS)}
    assert OWN_WORDS.keys() == lightnings


def test_a_source_has_the_keys_of_its_class_and_the_formats_there_are() -> None:
    described = {key: meaning for key, _, _, meaning in rows(ABOUT_SOURCES)}
    assert list(described) == [field.name for field in fields(SourceConfig)]
    assert all(re.search(rf"\b{name}\b", described["format"]) for name in FORMATS)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files and a part, in the folder that a user stands in."""
    monkeypatch.chdir(tmp_path)
    first = {
        "model": {"model_name_or_path": "BASE", "lora": {"r": 8, "target_modules": ["q_proj"]}},
        "data": {"sources": "ROWS"},
    }
    second = {"model": {"lora": {"dropout": 0.1, "rank_pattern": {"q_proj": 4}}}}
    third = first | {"model": {"model_name_or_path": "BASE", "lora": "../part.yaml"}}
    (tmp_path / "folder").mkdir()
    for name, content in (
        ("first.yaml", first),
        ("second.yaml", second),
        ("part.yaml", {"r": 32}),
        ("folder/third.yaml", third),
    ):
        (tmp_path / name).write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--config first.yaml --config second.yaml", {"r": 8, "dropout": 0.1}),
        ("--config first.yaml --model.lora.r 16", {"r": 16}),
        ("--model.lora.r 16 --config first.yaml", {"r": 8}),
        ("--config first.yaml --model.lora part.yaml", {"r": 32, "target_modules": ["q_proj"]}),
        ("--config folder/third.yaml", {"r": 32, "target_modules": "all-linear"}),
        (
            "--config first.yaml --model.lora.target_modules [k_proj]",
            {"target_modules": ["k_proj"]},
        ),
        (
            "--config first.yaml --model.lora.target_modules+ k_proj",
            {"target_modules": ["q_proj", "k_proj"]},
        ),
        (
            "--config first.yaml --config second.yaml --model.lora.rank_pattern '{k_proj: 16}'",
            {"rank_pattern": {"k_proj": 16}},
        ),
        (
            "--config first.yaml --config second.yaml --model.lora.rank_pattern.k_proj 16",
            {"rank_pattern": {"q_proj": 4, "k_proj": 16}},
        ),
    ],
)
def test_words_merge_from_left_to_right_as_the_page_says(
    files: None, parse: Callable[..., Any], words: str, expected: dict[str, Any]
) -> None:
    lora = parse(*shlex.split(words)).model.lora
    assert {key: lora[key] for key in expected} == expected


def test_environment_variables_set_no_key(
    parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names that jsonargparse would read, were it told to."""
    for prefix in ("PL", "QLORA_PL", "QLORA_PL_FIT", "PL_FIT"):
        monkeypatch.setenv(f"{prefix}__MODEL__LORA__R", "3")
        monkeypatch.setenv(f"{prefix}_MODEL__LORA__R", "3")
    assert parse(*BASE, *ROWS).model.lora.r == 64


def test_epochs_are_filled_in_as_the_page_says(parse: Callable[..., Any]) -> None:
    assert f"`trainer.max_epochs` becomes {DEFAULT_EPOCHS} where" in PAGE
    assert complete(parse(*BASE, *ROWS)).trainer.max_epochs == DEFAULT_EPOCHS
    for limit in ("--trainer.max_steps 5", "--trainer.max_time 00:01:00:00"):
        assert complete(parse(*BASE, *ROWS, *limit.split())).trainer.max_epochs is None
