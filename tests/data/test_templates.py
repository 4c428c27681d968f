"""The rendered text of every template, character for character, and which of it is trained."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE
from toy_tokenizers import TEXTS, asked, build

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.templates import (
    TEMPLATES,
    TEXT_TEMPLATES,
    ChatTemplate,
    PromptTemplate,
    load_template,
)
from qlora_pl.errors import ConfigurationError

NAMES = [*TEXT_TEMPLATES, "chat"]


def template(name: str, chat_template: str | None = CHAT_TEMPLATE) -> PromptTemplate:
    return load_template(name, build("bytes", chat_template))


def shown(rendered_by: PromptTemplate, conversation: Conversation) -> str:
    """The text with what is trained in ⟦brackets⟧."""
    return "".join(
        f"⟦{segment.text}⟧" if segment.is_trained else segment.text
        for segment in rendered_by.render(conversation)
    )


def with_context(question: str, context: str, answer: str) -> Conversation:
    return Conversation((Message("user", question, context=context), Message("assistant", answer)))


# -- the wording -------------------------------------------------------------------------------

PLAIN, WITH_CONTEXT, TWO_TURNS, WITH_SYSTEM = (
    asked("Why?", "Because."),
    with_context("Sum up.", "A long text.", "Short."),
    asked("One?", "1.", "Two?", "2."),
    asked("Why?", "Because.", system="Be brief."),
)
EXPECTED = {
    # artidoro/qlora's ALPACA_PROMPT_DICT, whose prompts end in "### Response: "; the paper's runs.
    ("alpaca", PLAIN): (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhy?\n\n### Response:⟦ Because.</s>⟧"
    ),
    ("alpaca", WITH_CONTEXT): (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSum up.\n\n### Input:\nA long text.\n\n### Response:⟦ Short.</s>⟧"
    ),
    ("alpaca", TWO_TURNS): (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nOne?\n\n### Response:⟦ 1.</s>⟧\n\n"
        "### Instruction:\nTwo?\n\n### Response:⟦ 2.</s>⟧"
    ),
    ("alpaca", WITH_SYSTEM): (
        "Be brief.\n\n### Instruction:\nWhy?\n\n### Response:⟦ Because.</s>⟧"
    ),
    # timdettmers/openassistant-guanaco: "### Human: ...### Assistant: ...### Human: ..."
    ("guanaco", PLAIN): "### Human: Why?### Assistant:⟦ Because.</s>⟧",
    ("guanaco", WITH_CONTEXT): ("### Human: Sum up.\n\nA long text.### Assistant:⟦ Short.</s>⟧"),
    ("guanaco", TWO_TURNS): (
        "### Human: One?### Assistant:⟦ 1.</s>⟧### Human: Two?### Assistant:⟦ 2.</s>⟧"
    ),
    ("guanaco", WITH_SYSTEM): "Be brief.\n\n### Human: Why?### Assistant:⟦ Because.</s>⟧",
    ("instruction-response", PLAIN): ("### Instruction:\nWhy?\n\n### Response:\n⟦Because.</s>⟧"),
    ("instruction-response", WITH_CONTEXT): (
        "### Instruction:\nSum up.\n\nA long text.\n\n### Response:\n⟦Short.</s>⟧"
    ),
    ("instruction-response", TWO_TURNS): (
        "### Instruction:\nOne?\n\n### Response:\n⟦1.</s>⟧\n\n"
        "### Instruction:\nTwo?\n\n### Response:\n⟦2.</s>⟧"
    ),
    ("instruction-response", WITH_SYSTEM): (
        "Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\n⟦Because.</s>⟧"
    ),
    ("chat", PLAIN): (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦Because.<|im_end|>⟧\n"
    ),
    ("chat", WITH_CONTEXT): (
        "<|im_start|>user\nSum up.\n\nA long text.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Short.<|im_end|>⟧\n"
    ),
    ("chat", TWO_TURNS): (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦1.<|im_end|>⟧\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦2.<|im_end|>⟧\n"
    ),
    ("chat", WITH_SYSTEM): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Because.<|im_end|>⟧\n"
    ),
}


@pytest.mark.parametrize(("name", "conversation"), EXPECTED, ids=lambda value: str(value)[:30])
def test_rendered_text_is_the_published_one_with_only_answers_trained(
    name: str, conversation: Conversation
):
    """Written out by hand from the sources named beside each template."""
    assert shown(template(name), conversation) == EXPECTED[name, conversation]


def test_an_empty_system_message_is_no_system_message():
    """Datasets with a system column leave it empty more often than not."""
    for name in TEXT_TEMPLATES:
        empty = asked("Why?", "Because.", system="")
        assert shown(template(name), empty) == shown(template(name), PLAIN)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_text_before_the_answer(name: str):
    rendered_by = template(name)
    chosen = random.Random(0)
    for _ in range(200):
        contents = chosen.choices(TEXTS, k=2 * chosen.randint(1, 3))
        conversation = asked(*contents, system=chosen.choice([None, "Be brief."]))
        text = "".join(segment.text for segment in rendered_by.render(conversation))
        prompt = rendered_by.render_prompt(conversation.prompt)
        assert text.startswith(prompt)
        assert text[len(prompt) :].lstrip(" ").startswith(contents[-1].lstrip(" "))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_user_writes_does_not_move_what_is_trained(name: str):
    """By comparison with a harmless text in the same place: markers, control tokens, braces."""
    rendered_by = template(name)
    harmless = [segment.is_trained for segment in rendered_by.render(asked("q", "a", "q", "a"))]
    for text in TEXTS:
        segments = rendered_by.render(asked(text, text, text, text))
        assert [segment.is_trained for segment in segments] == harmless
        trained = [segment.text for segment in segments if segment.is_trained]
        assert len(trained) == 2
        assert all(text in answer for answer in trained)


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_gets_a_stop_token_and_no_template(name: str):
    assert shown(template(name), Conversation.from_text("Once upon")) == "⟦Once upon</s>⟧"


# -- the tokenizer's own template --------------------------------------------------------------


def test_a_chat_template_that_trims_its_messages_is_followed():
    trimming = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    assert shown(template("chat", trimming), asked(" Why? ", " Because.\n")) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦Because.<|im_end|>⟧\n"
    )


def test_a_chat_template_that_rewrites_earlier_answers_is_refused():
    """As the templates of reasoning models, which drop the thoughts of earlier answers."""
    forgetful = (
        "{% for m in messages %}[{{ m['role'] }}]"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rendered_by = template("chat", forgetful)
    assert shown(rendered_by, PLAIN) == "[user]Why?</s>[assistant]⟦<think></think>Because.</s>⟧"
    with pytest.raises(
        ConfigurationError, match=r"data\.template: .*\(message 4\).* cannot be told"
    ):
        rendered_by.render(TWO_TURNS)


def test_a_chat_template_that_refuses_a_conversation_is_quoted():
    """As Gemma's, which knows no system message."""
    refusing = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + CHAT_TEMPLATE
    )
    rendered_by = template("chat", refusing)
    rendered_by.render(PLAIN)
    with pytest.raises(ConfigurationError, match=r"data\.template: .*System role not supported"):
        rendered_by.render(WITH_SYSTEM)


# -- choosing one ------------------------------------------------------------------------------


def test_auto_is_the_tokenizers_own_where_it_has_one():
    assert isinstance(template("auto"), ChatTemplate)
    assert template("auto", None).name == "instruction-response"
    for name in NAMES:
        assert template(name).name == name
    assert set(TEMPLATES) == {"auto", *NAMES}


def no_stop_token(tokenizer: Any) -> Any:
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    return without


@pytest.mark.parametrize(
    ("name", "tokenizer", "sentence"),
    [
        (
            "alpacca",
            build("bytes"),
            r"data\.template: no template is called 'alpacca' .*; did you mean 'alpaca'\?",
        ),
        ("chat", build("bytes", None), r"data\.template: .* has no chat template; choose one of"),
        ("auto", no_stop_token(build("bytes")), r"data\.tokenizer: .* has no end-of-text token"),
    ],
    ids=["misspelt", "no chat template", "no stop token"],
)
def test_an_impossible_template_is_one_sentence(name: str, tokenizer: Any, sentence: str):
    with pytest.raises(ConfigurationError, match=sentence):
        load_template(name, tokenizer)
