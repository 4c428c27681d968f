"""The chat template that travels with a model gives the tokens of training, in plain transformers.

What is compared: ``apply_chat_template`` of transformers, which knows nothing of this project, and
the encoder that made the training rows.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import real_tokenizers
from real_tokenizers import CHATML_WITH_DEFAULT, INST, INST_LAST, LLAMA3, real
from toy_tokenizers import KINDS, asked, build

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.original_encoding import OriginalEncoder
from qlora_pl.data.encoding.served_template import (
    chat_template_ids,
    comparable,
    differences,
    encoder_joints,
    served_chat_template,
    served_tokenizer,
)
from qlora_pl.data.templates.example_conversations import EXAMPLES
from qlora_pl.data.templates.joints import Joints
from qlora_pl.data.templates.loading import load_template
from qlora_pl.data.templates.wording import TEXT_TEMPLATES
from qlora_pl.errors import ConfigurationError

CHAT_TEMPLATES = {
    "chatml": real_tokenizers.CHATML,
    "default system": CHATML_WITH_DEFAULT,
    "trimmed": LLAMA3,
    "folded": INST,
    "folded last": INST_LAST,
}
REWRITING = real_tokenizers.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
"""As reasoning models' templates: thoughts of earlier answers are left out."""


def encoder_of(
    kind: str, template: Any, original: bool = False, chat: str | None = None
) -> Encoder:
    tokenizer = build(kind, chat)
    loaded = load_template(template, tokenizer)
    return OriginalEncoder(loaded, tokenizer) if original else Encoder(loaded, tokenizer)


def check(encoder: Encoder) -> None:
    """Every example, in transformers' own way, with the tokenizer that would be written."""
    tokenizer = served_tokenizer(encoder)
    kept, _ = comparable(encoder, EXAMPLES)
    assert len(kept) >= len(EXAMPLES) - 3
    for name, conversation in kept.items():
        turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids == encoder.encode_prompt(conversation)[1], name


@pytest.mark.parametrize("original", [False, True], ids=["spans", "original"])
@pytest.mark.parametrize("name", sorted(set(TEXT_TEMPLATES) - {"llama3"}))  # not in these
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bytes-trimmed"])
def test_a_template_of_text_is_served_as_it_was_trained(kind: str, name: str, original: bool):
    check(encoder_of(kind, name, original))


@pytest.mark.parametrize("chat", CHAT_TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "bytes-bos", "sentencepiece"])
def test_a_chat_template_is_served_with_the_bos_that_training_added(kind: str, chat: str):
    check(encoder_of(kind, "chat", chat=CHAT_TEMPLATES[chat]))


@pytest.mark.parametrize("template", ["guanaco", "alpaca", "chat"])
@pytest.mark.parametrize("name", sorted(real_tokenizers.REAL))
def test_published_tokenizers_serve_what_was_trained(name: str, template: str):
    tokenizer = real(name)
    check(Encoder(load_template(template, tokenizer), tokenizer))


def test_a_chat_template_of_another_model_is_replaced():
    """Trained on Guanaco's wording with a tokenizer whose own template is ChatML."""
    encoder = encoder_of("bytes", "guanaco", chat=CHATML_WITH_DEFAULT)
    found = served_tokenizer(encoder)
    assert "im_start" not in found.chat_template
    assert encoder.tokenizer.chat_template == CHATML_WITH_DEFAULT, "the run's own is left alone"


def test_further_chat_templates_stay_beside_it():
    encoder = encoder_of("bytes", "guanaco")
    encoder.tokenizer.chat_template = {"default": CHATML_WITH_DEFAULT, "rag": "{{ documents }}"}
    try:
        found = served_tokenizer(encoder).chat_template
    finally:
        encoder.tokenizer.chat_template = None
    assert found["rag"] == "{{ documents }}"
    assert found["default"] == served_chat_template(encoder)


def test_without_a_faithful_template_none_is_written_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
):
    """A question before a system message, in one sentence, is no text between messages."""
    folding = {
        "question": "Q: {content}",
        "question_with_system": "Q: {content} ({system})",
        "answer": " {content}",
    }
    encoder = encoder_of("bytes", folding, chat=CHATML_WITH_DEFAULT)
    with caplog.at_level(logging.WARNING):
        assert served_tokenizer(encoder).chat_template is None
    assert "without a chat template" in caplog.text
    assert "moves a message" in caplog.text


def test_a_difference_is_shown_token_by_token():
    encoder = encoder_of("bytes-bos", "guanaco")
    without_bos = chat_template_ids(encoder.tokenizer, encoder_joints(encoder).jinja())
    found = next(differences(encoder, without_bos, {"one": asked("How many legs?")}))
    text = found.text(encoder.tokenizer, "the chat template")
    assert text.splitlines()[0] == "'one' differs from token 1 on:"
    assert f'training ({len(found.trained)} tokens): ... "<s>" ' in text
    assert f'the chat template ({len(found.trained) - 1} tokens): ... "#' in text


def test_what_spells_a_control_token_is_told_apart():
    encoder = encoder_of("bytes", "guanaco")
    kept, spelling = comparable(encoder, {"a": asked("fine"), "b": asked("it stops </s> here")})
    assert (list(kept), spelling) == (["a"], ["b"])


# -- joints ----------------------------------------------------------------------------------------


def test_joints_of_chatml_are_its_markers():
    found = encoder_joints(encoder_of("bytes", "chatml"))
    assert found == Joints(
        opening="<|im_start|>user\n",
        system="<|im_start|>system\n",
        system_to_question="<|im_end|>\n<|im_start|>user\n",
        question_to_answer="<|im_end|>\n<|im_start|>assistant\n",
        cue="<|im_end|>\n<|im_start|>assistant\n",
        answer_to_question="<|im_end|>\n<|im_start|>user\n",
        ending="<|im_end|>",
    )


@pytest.mark.parametrize("chat", ["chatml", "default system", "trimmed", "folded"])
def test_joints_write_what_the_template_writes(chat: str):
    encoder = encoder_of("bytes", "chat", chat=CHAT_TEMPLATES[chat])
    joints = encoder_joints(encoder)
    assert bool(joints.trimmed) is (chat == "trimmed")
    assert joints.shows_empty_system is (chat != "folded")
    for name, conversation in EXAMPLES.items():
        expected = encoder.encode_prompt(conversation)[0]
        assert joints.render(conversation.messages, True) == expected, name


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ messages[-1]['content'] }}", "drops, repeats or moves a message"),
        (real_tokenizers.CHATML + "{{ messages[0]['content'] }}", "repeats or moves a message"),
        (
            "{% for m in messages %}<{{ loop.index }}>{{ m['content'] }}{% endfor %}",
            "writes other text around later turns",
        ),
    ],
)
def test_what_is_more_than_text_between_messages_is_refused(source: str, what: str):
    with pytest.raises(ConfigurationError, match=what):
        encoder_joints(encoder_of("bytes", "chat", chat=source))


def test_a_template_that_refuses_system_messages_has_no_place_for_one():
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + real_tokenizers.CHATML
    )
    joints = encoder_joints(encoder_of("bytes", "chat", chat=refusing))
    assert joints.system is None
    with pytest.raises(ConfigurationError, match="no place for a system message"):
        joints.render(asked("a", system="b").messages, True)


def test_thoughts_that_are_left_out_are_found_by_the_examples():
    """The joints cannot tell, so whoever uses them renders the examples as well."""
    encoder = encoder_of("bytes", "chat", chat=REWRITING)
    joints = encoder_joints(encoder)
    thoughts = EXAMPLES["thoughts"]
    assert joints.render(thoughts.messages, True) != encoder.encode_prompt(thoughts)[0]


def test_a_text_is_read_back_into_its_messages():
    encoder = encoder_of("bytes", "vicuna")
    joints = encoder_joints(encoder)
    for system in (None, "Be brief."):
        said = asked("Why?", "Because.", "I see.", "Good.", system=system)
        text = encoder.template.render_rows([said])[0][0].text
        assert joints.read(text) == list(said.messages)
    assert joints.read("something else") is None


def test_an_empty_question_of_a_template_without_words_is_a_prompt():
    """There is no segment then whose text could begin with a BOS token."""
    encoder = encoder_of("bytes-bos", "plain")
    assert encoder.encode_prompt(asked("")) == ("", [1])
