"""A stop token that the base does not know stops the run, and what makes it known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, save_tokenizer

from qlora_pl.data.encoding.stop_tokens import check_stop_token, known_stop_tokens
from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import ConfigurationError

EOS, TURN_END = 2, 4


def base(folder: Path, chat_template: str | None = None, **config: Any) -> str:
    save_tokenizer(folder, chat_template=chat_template)
    settings = {"model_type": "llama", "vocab_size": 400, "eos_token_id": EOS} | config
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def check(name: str, template: Any, trained: tuple[str, ...] = (), grows: bool = False) -> None:
    tokenizer = load_tokenizer(name)
    known = known_stop_tokens(tokenizer, name, grows=grows)
    check_stop_token(load_template(template, tokenizer), tokenizer, name, known, trained)


def test_the_end_that_the_configuration_names_is_known(tmp_path: Path):
    name = base(tmp_path)
    for template in ("alpaca", "guanaco", "plain", "llama2"):
        check(name, template)


def test_an_unknown_end_is_one_sentence_with_the_remedies(tmp_path: Path):
    with pytest.raises(ConfigurationError) as caught:
        check(base(tmp_path), "chatml")
    sentence = str(caught.value)
    assert "'chatml' ends answers with '<|im_end|>'" in sentence
    assert "(it knows '</s>')" in sentence
    assert "model.lora.trainable_tokens ['<|im_end|>']" in sentence


@pytest.mark.parametrize("where", ["config", "a list", "generation config", "chat template"])
def test_an_end_is_known_wherever_the_base_says_so(tmp_path: Path, where: str):
    if where == "config":
        name = base(tmp_path, eos_token_id=TURN_END)
    elif where == "a list":
        name = base(tmp_path, eos_token_id=[EOS, TURN_END])
    elif where == "generation config":
        name = base(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": TURN_END}))
    else:
        name = base(tmp_path, chat_template=CHAT_TEMPLATE)
    check(name, "chatml")


def test_an_end_that_the_run_trains_is_known(tmp_path: Path):
    check(base(tmp_path), "chatml", trained=("<|im_end|>",))


def test_an_end_that_gets_a_row_of_its_own_is_known(tmp_path: Path):
    """With a configuration that has four rows, and a vocabulary that may grow."""
    name = base(tmp_path, vocab_size=TURN_END)
    with pytest.raises(ConfigurationError):
        check(name, "chatml")
    check(name, "chatml", grows=True)


def test_somebody_elses_jinja_is_checked_too(tmp_path: Path):
    name = base(tmp_path, chat_template=CHAT_TEMPLATE.replace("<|im_end|>", "</s>"))
    check(name, "chat")
    with pytest.raises(ConfigurationError, match=r"ends answers with '<\|im_end\|>'"):
        check(name, {"jinja": CHAT_TEMPLATE})


def test_a_tokenizer_alone_tells_nothing(tmp_path: Path):
    save_tokenizer(tmp_path)
    check(str(tmp_path), "chatml")
