"""Keys, tokens and passwords are neither written nor said, wherever a user has put them."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from typed import type_words

from qlora_pl.redaction import (
    REDACTED,
    RedactingFormatter,
    known_secrets,
    print_redacted_traceback,
    redact,
    secrets_in,
)

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process

# Put together here, so that no scanner takes this file for a leak.
PLANTED = {
    "HF_TOKEN": "hf_" + "PlantedTokenOfTheHubAbcdefghijklmn",
    "HUGGING_FACE_HUB_TOKEN": "planted-older-name-of-the-same",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "planted1",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access/key/of/forty/chars",
    "AWS_ACCESS_KEY_ID": "AKIA" + "PLANTEDPLANTED12",
    "MY_SERVICE_PASSWORD": "planted-password-of-mine",
}
IN_WORDS = "planted-in-the-very-words"


class KeyedLogger(CSVLogger):
    """A logger that takes a key, as those of several services do."""

    def __init__(self, save_dir: str = ".", api_key: str | None = None) -> None:
        super().__init__(save_dir)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in; home and caches lie beside it, secrets in the environment."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def type_in(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], planted: Path
) -> Callable[..., tuple[int, str]]:
    """Types a command; its exit code, and everything it printed."""

    def run(*words: object) -> tuple[int, str]:
        code, out, said = type_words(monkeypatch, capfd, *words)
        return code, out + said

    return run


def fit(base: Path, rows: Path, *more: object) -> list[object]:
    words = ["fit", "--model.model_name_or_path", base, "--data.sources", rows, "--model.lora.r", 4]
    short = ["--data.template", "guanaco", "--data.max_length", 64, "--trainer.accelerator", "cpu"]
    return [*words, *short, "--trainer.max_steps", 1, "--samples.decoding.max_new_tokens", 2, *more]


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, and what is packed in it."""
    for path in folder.rglob("*"):
        if path.is_dir() or not path.exists():
            continue
        yield str(path), path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield f"{path}!{name}", archive.read(name)
        elif path.suffix == ".gz":
            yield f"{path}!", gzip.decompress(path.read_bytes())


def leaks(folder: Path, secrets: list[str]) -> list[str]:
    return [
        name
        for name, content in contents(folder)
        for secret in secrets
        if secret.encode() in content or secret.encode() in name.encode()
    ]


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(f"a {IN_WORDS} b")
    (tmp_path / "y.gz").write_bytes(gzip.compress(IN_WORDS.encode()))
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", IN_WORDS * 9)
    assert len(leaks(tmp_path, [IN_WORDS])) == 3


# -- runs ------------------------------------------------------------------------------------------


def test_a_run_writes_and_says_nothing_of_the_environment_s_secrets(
    type_in: Any, planted: Path, tiny_base: Path, rows_file: Path
) -> None:
    code, said = type_in(*fit(tiny_base, rows_file))
    assert code == 0, said
    names = {path.name for path in planted.rglob("*")}
    assert {"run.yaml", "environment.json", "manifest.json", "README.md", "packed.json"} <= names
    assert any("tfevents" in name for name in names)
    assert any(name.endswith(".ckpt") for name in names)
    assert leaks(planted, list(PLANTED.values())) == []
    assert not [value for value in PLANTED.values() if value in said]


@pytest.mark.slow
def test_nor_does_a_process_of_its_own_that_fails_half_way(
    planted: Path, tiny_base: Path, rows_file: Path
) -> None:
    """Its error quotes a token, and so does a library that logs."""
    (planted / "work" / "telling.py").write_text(
        "import logging, os\n"
        "from lightning.pytorch import Callback\n"
        "class Tells(Callback):\n"
        "    def on_train_start(self, *_):\n"
        "        logging.getLogger('somelibrary').warning('sent %s', os.environ['HF_TOKEN'])\n"
        "    def on_train_end(self, *_):\n"
        "        raise RuntimeError('https://me:' + os.environ['MY_SERVICE_PASSWORD'] + '@host/')\n"
    )
    words = fit(tiny_base, rows_file, "--trainer.callbacks+=telling.Tells")
    paths = [str(Path(__file__).parent.parent), str(planted / "work")]
    done = subprocess.run(
        [sys.executable, "-m", "qlora_pl", *map(str, words)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"sent {REDACTED}" in done.stderr
    assert "RuntimeError: https://" in done.stderr
    assert not [value for value in PLANTED.values() if value in done.stdout + done.stderr]
    (planted / "work" / "telling.py").unlink()
    assert leaks(planted, list(PLANTED.values())) == []


CONFIGURED: dict[str, dict[str, Any]] = {
    "data.sources[0].path": {"data": {"sources": f"https://me:{IN_WORDS}@host/rows.jsonl"}},
    "data.val_sources[0].path": {"data": {"val_sources": f"https://host/x?sig={IN_WORDS}"}},
    "trainer.logger.init_args.api_key": {
        "trainer": {
            "logger": {
                "class_path": "security.test_secrets.KeyedLogger",
                "init_args": {"api_key": IN_WORDS},
            }
        }
    },
    "trainer.logger[1].init_args.api_key": {
        "trainer": {
            "logger": [
                {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
                {
                    "class_path": "security.test_secrets.KeyedLogger",
                    "init_args": {"api_key": IN_WORDS},
                },
            ]
        }
    },
    "run.name": {"run": {"name": PLANTED["MY_SERVICE_PASSWORD"]}},
    "model.revision": {"model": {"revision": PLANTED["HF_TOKEN"]}},
    "model.model_name_or_path": {
        "model": {"model_name_or_path": f"https://me:{IN_WORDS}@host/owner/model"}
    },
}


@pytest.mark.parametrize("key", CONFIGURED)
def test_a_secret_in_a_configuration_is_refused_by_its_key_and_never_repeated(
    type_in: Any, planted: Path, tiny_base: Path, rows_file: Path, key: str
) -> None:
    words = fit(tiny_base, rows_file)
    group, inner = next(iter(CONFIGURED[key].items()))
    if group in ("data", "model"):  # a flag would win over the file
        place = (
            words.index(f"--{group}.{next(iter(inner))}")
            if f"--{group}.{next(iter(inner))}" in words
            else None
        )
        words = words if place is None else words[:place] + words[place + 2 :]
    file = planted / "work" / "mine.yaml"
    file.write_text(yaml.safe_dump(CONFIGURED[key]))
    code, said = type_in(*words, "--config", file)
    assert code == 2, said
    assert f"qlora-pl: {key}: it holds " in said
    assert IN_WORDS not in said
    assert not [value for value in PLANTED.values() if value in said]
    file.unlink()
    assert leaks(planted, [IN_WORDS, *PLANTED.values()]) == []


FLAGS = {
    "a logger's key": [
        "--trainer.logger",
        "security.test_secrets.KeyedLogger",
        "--trainer.logger.init_args.api_key",
        IN_WORDS,
    ],
    "an unknown key": ["--hf_token", IN_WORDS],
    "an unknown key with =": [f"--model.api_key={IN_WORDS}"],
    "no key at all": [PLANTED["HF_TOKEN"]],
    "a value of another type": ["--trainer.max_steps", PLANTED["HF_TOKEN"]],
    "an address": ["--data.sources", f"https://me:{IN_WORDS}@host/rows.jsonl"],
    "a checkpoint": ["--ckpt_path", f"https://me:{IN_WORDS}@host/x.ckpt"],
    "a file": ["--config", f"{PLANTED['MY_SERVICE_PASSWORD']}.yaml"],
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_a_secret_on_the_command_line_is_neither_repeated_nor_written(
    type_in: Any, planted: Path, tiny_base: Path, rows_file: Path, name: str, command: str
) -> None:
    words = fit(tiny_base, rows_file, *FLAGS[name])
    first = ["inspect", "data"] if command == "inspect" else ["fit"]
    code, said = type_in(*first, *words[1:])
    assert code == 2, said
    assert "qlora-pl: " in said
    assert IN_WORDS not in said.lower()
    assert not [value for value in PLANTED.values() if value.lower() in said.lower()]
    assert leaks(planted, [IN_WORDS, *PLANTED.values()]) == []


# -- what is told from what ------------------------------------------------------------------------

SECRET = {
    "https://me:planted-password@host/x": f"https://{REDACTED}@host/x",
    "https://planted-token@host/x": f"https://{REDACTED}@host/x",
    "s3://host/x?X-Amz-Signature=abc&y=1": f"s3://host/x?X-Amz-Signature={REDACTED}&y=1",
    "https://host/x?a=1&token=abc": f"https://host/x?a=1&token={REDACTED}",
    "use " + "hf_" + "a" * 34 + ".": f"use {REDACTED}.",
    "AKIA" + "ABCDEFGH12345678": REDACTED,
    "ghp_" + "a1" * 18: REDACTED,
}
NO_SECRET = (
    "https://arxiv.org/abs/2305.14314",
    "meta-llama/Llama-2-7b-hf",
    "/data/sk-learn-rows-of-the-second-kind/x.jsonl",
    "hf_internal_testing/tiny",
    "runs/alpaca/version_0/checkpoints/step-00000250.ckpt",
    "user@host:/home/x",
    "a: b @ c",
    "87a36b3db413da7ddebc0ca87f4176ca954dc8031bd9777a5b1edd3c577b2a3c",  # a revision, a digest
    "{'instruction': 'token'}",
)


@pytest.mark.parametrize("text", SECRET)
def test_secrets_are_told_by_their_form(text: str) -> None:
    assert redact(text) == SECRET[text]
    assert list(secrets_in({"x": text}))


@pytest.mark.parametrize("text", NO_SECRET)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text
    assert not list(secrets_in({"path": text}))


@pytest.mark.parametrize(
    ("key", "is_secret"),
    [
        ("api_key", True),
        ("aws_secret_access_key", True),
        ("password", True),
        ("token", True),
        ("hf_token", True),
        ("eos_token", False),
        ("max_new_tokens", False),
        ("pack_tokens", False),
        ("tokenizer", False),
        ("key", False),
        ("monitor", False),
    ],
)
def test_secrets_are_told_by_their_key(key: str, is_secret: bool) -> None:
    found = list(secrets_in({"group": [{key: "an ordinary word"}]}))
    assert bool(found) == is_secret
    assert not any("an ordinary word" in sentence for sentence in found)
    assert not list(secrets_in({key: None, "x": {key: ""}}))


def test_variables_of_the_environment_are_told_by_their_names(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "an ordinary value")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(planted))  # a path is no secret
    monkeypatch.setenv("SHORT_TOKEN", "model")
    assert known_secrets().keys() & {*PLANTED} == {*PLANTED}
    others = {"TOKENIZERS_PARALLELISM", "GOOGLE_APPLICATION_CREDENTIALS", "SHORT_TOKEN"}
    assert not known_secrets().keys() & others


def test_logs_and_tracebacks_are_redacted(
    planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise RuntimeError(f"no {PLANTED['WANDB_API_KEY']} at https://a:{IN_WORDS}@host/")
    except RuntimeError as error:
        record = logging.LogRecord("x", 30, "x", 1, "%s", (error,), (RuntimeError, error, None))
        logged = RedactingFormatter("%(message)s").format(record)
        print_redacted_traceback(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    for text in (logged, told):
        assert REDACTED in text
        assert PLANTED["WANDB_API_KEY"] not in text
        assert IN_WORDS not in text.replace(f"{{{IN_WORDS}}}", "")


def test_the_recorded_command_is_redacted(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second line of defence: such a command is refused before anything is recorded."""
    from qlora_pl.training.run_folders.run_record import environment

    monkeypatch.setattr(sys, "argv", ["qlora-pl", "fit", "--x", PLANTED["HF_TOKEN"]])
    assert json.dumps(environment()).count(REDACTED) == 1
    assert PLANTED["HF_TOKEN"] not in json.dumps(environment())
