"""Prompts of an export that differ from those of training stop it, and are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data.real_tokenizers import INST
from data.toy_tokenizers import build
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.served_template import chat_template_ids, encoder_joints
from qlora_pl.data.templates.example_conversations import EXAMPLES
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import ConfigurationError
from qlora_pl.exporting import parity
from qlora_pl.exporting.parity import (
    check_parity,
    held_out_conversations,
    llama_cpp_ids,
    llama_cpp_template,
    text_ids,
    tokenizer_folder_ids,
)
from qlora_pl.inference.loading import load_encoder
from qlora_pl.inference.source import ModelChoice, resolve_source

WAY = "the chat template"

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # a run trains in this process


@pytest.fixture(scope="module")
def encoder(adapter: Path) -> Encoder:
    """Training's own: Guanaco's wording, over a tokenizer whose chat template was ChatML."""
    return load_encoder(resolve_source(ModelChoice(adapter=(str(adapter),))))


def test_an_adapter_folder_brings_the_chat_template_that_it_was_trained_with(
    adapter: Path, encoder: Encoder
):
    plain = AutoTokenizer.from_pretrained(adapter)
    asked = [{"role": "user", "content": "How many legs?"}]
    ids = plain.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    conversation = Conversation((Message("user", "How many legs?"),))
    assert plain.decode(ids) == "<s>### Human: How many legs?### Assistant:"
    assert ids == encoder.encode_prompt(conversation)[1]


def test_held_out_rows_are_read_back_and_compared(adapter: Path, encoder: Encoder):
    rows = load_file(adapter / "held_out.safetensors")["starts"]
    found = check_parity(encoder, {WAY: tokenizer_folder_ids(adapter)}, adapter)
    assert found.num_rows == len(rows) - 1 > 0
    assert found.num_unread_rows == 0
    assert found.num_examples == len(EXAMPLES)
    assert f"{len(EXAMPLES)} conversations of all kinds and {found.num_rows} held-out rows" in (
        found.in_words()
    )


def test_a_held_out_row_gives_the_question_that_it_was_made_of(adapter: Path, encoder: Encoder):
    found, _ = held_out_conversations(encoder, adapter)
    arrays = load_file(adapter / "held_out.safetensors")
    first = encoder.tokenizer.decode(arrays["input_ids"][: arrays["starts"][1]])
    (question,) = found["held-out row 1"].messages
    assert first.startswith(f"<s>### Human: {question.content}### Assistant: ")


def test_a_row_of_another_shape_is_counted_and_left_out(
    adapter: Path, encoder: Encoder, tmp_path: Path
):
    arrays = load_file(adapter / "held_out.safetensors")
    strange = encoder.tokenizer("no template at all")["input_ids"]
    arrays["input_ids"] = torch.tensor([*arrays["input_ids"].tolist(), *strange]).numpy()
    arrays["starts"] = torch.tensor([*arrays["starts"].tolist(), len(arrays["input_ids"])]).numpy()
    save_file(arrays, tmp_path / "held_out.safetensors")
    found = check_parity(encoder, {WAY: tokenizer_folder_ids(adapter)}, tmp_path)
    assert found.num_unread_rows == 1
    assert "1 held-out rows could not be read back" in found.in_words()


def test_another_models_chat_template_stops_an_export_with_the_tokens_that_differ(
    adapter: Path, encoder: Encoder, tiny_base: Path
):
    """The base's own ChatML, which travelled with adapters and merged models without a word."""
    base: Any = AutoTokenizer.from_pretrained(tiny_base)
    with pytest.raises(ConfigurationError) as raised:
        check_parity(encoder, {WAY: chat_template_ids(base)}, adapter)
    sentence, first, training, theirs, *_ = str(raised.value).splitlines()
    rows = len(held_out_conversations(encoder, adapter)[0])
    total = len(EXAMPLES) + rows
    assert sentence == (
        f"{WAY} makes other prompts than training did, {total} of {total}, so nothing was written:"
    )
    assert first == "'one question' differs from token 1 on:"
    assert training.startswith("  training (")
    assert '"<s>"' in training
    assert theirs.startswith(f"  {WAY} (")
    assert '"<|im_start|>"' in theirs


def test_a_second_bos_is_found(encoder: Encoder):
    """A text that writes BOS itself, given to an engine that puts one first."""
    joints = encoder_joints(encoder)
    fine = text_ids(encoder.tokenizer, joints)
    assert check_parity(encoder, {"the Modelfile": fine}).num_examples == len(EXAMPLES)

    def twice(conversation: Conversation) -> list[int]:
        text = "<s>" + joints.render(conversation.messages, asks=True)
        ids: list[int] = encoder.tokenizer(text)["input_ids"]
        return ids

    with pytest.raises(ConfigurationError, match='"<s>" "<s>"'):
        check_parity(encoder, {"the Modelfile": twice})


def test_what_spells_a_control_token_is_left_out_and_said(
    adapter: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
):
    spelling = Conversation((Message("user", "it stops </s> here"),))
    way = {WAY: tokenizer_folder_ids(adapter)}
    assert way[WAY](spelling) != encoder.encode_prompt(spelling)[1], "so it must be left out"
    monkeypatch.setattr(parity, "EXAMPLES", EXAMPLES | {"a stop token": spelling})
    found = check_parity(encoder, way)
    assert found.spelling == ("a stop token",)
    assert "1 conversations spell a control token" in found.in_words()


def test_a_tokenizer_without_a_chat_template_is_not_served(adapter: Path, tmp_path: Path):
    bare: Any = AutoTokenizer.from_pretrained(adapter)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="No chat template gives the prompts"):
        tokenizer_folder_ids(tmp_path)


@pytest.mark.parametrize("template", ["guanaco", "llama2", "chat"])
@pytest.mark.parametrize("kind", ["bytes", "bytes-bos", "sentencepiece"])
def test_llama_cpp_is_given_jinja_without_the_bos_that_it_puts_first(kind: str, template: str):
    """Also where SentencePiece puts a space before a text, which none may be written for then."""
    tokenizer = build(kind, INST)
    encoder = Encoder(load_template(template, tokenizer), tokenizer)
    way = {WAY: llama_cpp_ids(tokenizer, llama_cpp_template(encoder))}
    if kind == "sentencepiece" and template != "guanaco":
        # Written, BOS is followed by no space; put there by a tokenizer, by one.
        with pytest.raises(ConfigurationError, match='"<s>" "▁" "<0x5B>"'):
            check_parity(encoder, way)
    else:
        assert check_parity(encoder, way).num_examples == len(EXAMPLES)
