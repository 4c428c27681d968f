"""The rendered text of every template, character for character, and which of it is trained."""

from __future__ import annotations

import copy
import random
from itertools import groupby
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE
from toy_tokenizers import TEXTS, asked, build

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.templates.chat_template import ChatTemplate
from qlora_pl.data.templates.loading import TEMPLATES, load_template
from qlora_pl.data.templates.template import PromptTemplate, Segment
from qlora_pl.data.templates.wording import TEXT_TEMPLATES
from qlora_pl.errors import ConfigurationError

NAMES = [name for name in (*TEXT_TEMPLATES, "chat") if name != "llama3"]  # has tokens of its own


def template(name: str, chat_template: str | None = CHAT_TEMPLATE) -> PromptTemplate:
    return load_template(name, build("bytes", chat_template))


def in_brackets(segments: list[Segment]) -> str:
    """The text with each answer in ⟦brackets⟧."""
    text = ""
    for is_answer, some in groupby(segments, key=lambda s: s.message if s.is_answer else None):
        joined = "".join(segment.text for segment in some)
        text += joined if is_answer is None else f"⟦{joined}⟧"
    return text


def shown(rendered_by: PromptTemplate, conversation: Conversation) -> str:
    return in_brackets(rendered_by.render(conversation))


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
    for name in set(NAMES) - {"chat"}:
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
        prompt = rendered_by.render_prompt(conversation.prompt).text
        assert text.startswith(prompt)
        assert text[len(prompt) :].lstrip(" ").startswith(contents[-1].lstrip(" "))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_user_writes_does_not_move_what_is_trained(name: str):
    """By comparison with a harmless text in the same place: markers, control tokens, braces."""
    rendered_by = template(name)
    harmless = shown(rendered_by, asked("q§", "a§", "q§", "a§"))
    for text in TEXTS:
        expected = harmless.replace("q§", text).replace("a§", text)
        assert shown(rendered_by, asked(text, text, text, text)) == expected


# -- the tokenizer's own template --------------------------------------------------------------


def test_a_chat_template_that_trims_its_messages_is_followed():
    trimming = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    assert shown(template("chat", trimming), asked(" Why? ", " Because.\n")) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦Because.<|im_end|>⟧\n"
    )


FORGETFUL = (  # as the templates of reasoning models, which drop the thoughts of earlier answers
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_chat_template_that_rewrites_earlier_answers_gives_a_row_for_each():
    rendered_by = template("chat", FORGETFUL)
    assert shown(rendered_by, PLAIN) == "[user]Why?</s>[assistant]⟦<think></think>Because.</s>⟧"
    (rows,) = rendered_by.render_rows([TWO_TURNS])
    assert [
        "".join(f"⟦{s.text}⟧" if s.is_answer else s.text for s in r.segments) for r in rows
    ] == [
        "[user]One?</s>[assistant]⟦<think></think>1.</s>⟧",
        "[user]One?</s>[assistant]1.</s>[user]Two?</s>[assistant]⟦<think></think>2.</s>⟧",
    ]
    ((last,),) = rendered_by.render_rows([TWO_TURNS], only_last=True)
    assert last.segments == rows[1].segments


def test_a_chat_template_that_renders_an_answer_apart_from_its_prompt_is_refused():
    changing = (
        "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(
        ConfigurationError, match=r"data\.template: .*\(message 2\).* cannot be told"
    ):
        template("chat", changing).render(PLAIN)


@pytest.mark.parametrize(
    ("lines", "dropped"),
    [
        ("{% for m in messages if m['role'] != 'system' %}[{{ m['content'] }}]{% endfor %}", 1),
        ("{% for m in messages %}[{{ m['content'] | upper }}]{% endfor %}", 1),
        (
            "{% for m in messages %}{% if loop.index > 2 or m['role'] == 'system' %}"
            "[{{ m['content'] }}]{% endif %}{% endfor %}",
            2,
        ),
    ],
    ids=["the system message", "all letters", "a question"],
)
def test_a_message_that_a_chat_template_drops_or_rewrites_is_named(lines: str, dropped: int):
    """As Mistral-Nemo's template, which drops the system message of a longer conversation."""
    with pytest.raises(ConfigurationError, match=rf"drops or rewrites message {dropped} \("):
        template("chat", lines).render(WITH_SYSTEM)


def test_a_system_message_may_move_into_the_question():
    moving = (
        "{% for m in messages if m['role'] != 'system' %}[{{ m['content'] }}"
        "{% if m['role'] == 'user' and messages[0]['role'] == 'system' %}"
        " ({{ messages[0]['content'] }}){% endif %}]{% endfor %}"
    )
    assert shown(template("chat", moving), WITH_SYSTEM) == "[Why? (Be brief.)]⟦[Because.]⟧"


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


def test_the_text_is_that_of_transformers():
    """Rendered without the detour over ``apply_chat_template``, in the same characters."""
    tokenizer = build("bytes")
    with_tokens = "{{ bos_token }}" + CHAT_TEMPLATE.replace("<|im_end|>", "{{ eos_token }}")
    for source in (CHAT_TEMPLATE, with_tokens, FORGETFUL):
        rendered_by = load_template({"jinja": source}, tokenizer)
        for conversation in (PLAIN, WITH_SYSTEM):
            turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
            expected = tokenizer.apply_chat_template(turns, chat_template=source, tokenize=False)
            text = "".join(segment.text for segment in rendered_by.render(conversation))
            assert text == expected
            asked_for = tokenizer.apply_chat_template(
                turns[:-1], chat_template=source, tokenize=False, add_generation_prompt=True
            )
            assert rendered_by.render_prompt(conversation.prompt).text == asked_for


# -- choosing one ------------------------------------------------------------------------------


def test_auto_is_the_tokenizers_own_where_it_has_one():
    assert isinstance(template("auto"), ChatTemplate)
    assert template("auto", None).name == "instruction-response"
    for name in NAMES:
        assert template(name).name == name
    assert set(TEMPLATES) == {"auto", "llama3", *NAMES}


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


def test_a_template_that_folds_the_system_message_keeps_it_beside_a_context():
    """One that has a place for a context too would have no place for both."""
    folding = {
        "question": "[{content}]",
        "question_with_context": "[{content} | {context}]",
        "question_with_system": "[{system}: {content}]",
        "answer": "{content}",
    }
    rendered_by = load_template(folding, build("bytes"))
    row = with_context("Sum up.", "A long text.", "Short.")
    assert shown(rendered_by, row) == "[Sum up. | A long text.]⟦Short.</s>⟧"
    with_system = Conversation((Message("system", "Be brief."), *row.messages))
    expected = "[Be brief.: Sum up.\n\nA long text.]⟦Short.</s>⟧"
    assert shown(rendered_by, with_system) == expected
