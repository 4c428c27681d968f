"""Chat templates with the habits of published ones: what they do to a conversation, and its masks.

Each is written after the model family that its name says, shortened to the habit in question.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from generated_rows import CLEAN, FRAGMENTS, encoder, generated
from test_masks import runs
from toy_tokenizers import asked, spell

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding import Encoder
from qlora_pl.errors import ConfigurationError

TURN = "<|im_start|>{{ m['role'] }}\n{{ content }}<|im_end|>\n"
CUE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN3 = (  # earlier answers lose their thoughts, the last one has empty ones put in
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1]"
    " if '</think>' in m['content'] else '' %}"
    "{% set content = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content %}"
    "{% endif %}{% endif %}" + TURN + "{% endfor %}" + CUE
)
PHI = (  # the end of text behind the last answer alone
    "{% for m in messages %}{% set content = m['content'] %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
NEMO = (  # the system message is written before the last question, unless an answer follows
    "{% for m in messages if m['role'] != 'system' %}{% set content = m['content'] %}"
    "{% if loop.last and messages[0]['role'] == 'system' %}"
    "{% set content = messages[0]['content'] + '\n\n' + content %}{% endif %}"
    + TURN
    + "{% endfor %}"
    + CUE
)
GEMMA = (  # no system messages, turns must alternate
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set content = m['content'] | trim %}" + TURN + "{% endfor %}" + CUE
)
OPTIONAL = (  # a system message is written where it says something
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if content %}" + TURN + "{% endif %}{% endfor %}" + CUE
)


def chat(source: str, kind: str = "qwen", **settings: str) -> Encoder:
    return encoder(kind, {"jinja": source}, **settings)


def shown(with_it: Encoder, conversation: Conversation) -> list[str]:
    """Each row as text, what is trained in ⟦brackets⟧."""
    (examples,) = with_it.encode([conversation])
    texts = []
    for example in examples:
        text, done = "", 0
        for start, end in runs(example.is_trained):
            before, trained = example.input_ids[done:start], example.input_ids[start:end]
            text += f"{spell(with_it.tokenizer, before)}⟦{spell(with_it.tokenizer, trained)}⟧"
            done = end
        texts.append(text + spell(with_it.tokenizer, example.input_ids[done:]))
    return texts


THINKING = asked("One?", "<think>\nhm\n</think>\n\n1.", "Two?", "<think>\nso\n</think>\n\n2.")


def test_a_template_that_forgets_thoughts_gives_a_row_for_each_answer_with_its_own():
    assert shown(chat(QWEN3), THINKING) == [
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nhm\n</think>\n\n1.<|im_end|>⟧\n",
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1.<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nso\n</think>\n\n2.<|im_end|>⟧\n",
    ]
    (last,) = shown(chat(QWEN3, train_on="last_answer"), THINKING)
    assert last == shown(chat(QWEN3), THINKING)[1]
    (whole,) = shown(chat(QWEN3, train_on="everything"), THINKING)
    assert whole.replace("⟦", "").replace("⟧", "") == last.replace("⟦", "").replace("⟧", "")


def test_an_answer_without_weight_is_no_row_of_its_own():
    first, *others = THINKING.messages
    row = Conversation((first, Message("assistant", "1.", weight=0.0), *others[1:]))
    assert len(shown(chat(QWEN3), row)) == 1
    assert "⟦<think>\nso" in shown(chat(QWEN3), row)[0]


def test_a_template_that_ends_the_last_turn_apart_gives_a_row_for_each_answer():
    assert shown(chat(PHI, "bytes"), asked("One?", "1.", "Two?", "2.")) == [
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦1.<|im_end|>\n</s>⟧",
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1.<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦2.<|im_end|>\n</s>⟧",
    ]


@pytest.mark.parametrize("source", [QWEN3, PHI], ids=["Qwen3", "Phi"])
@pytest.mark.parametrize("kind", ["qwen", "smollm2", "bytes"])
def test_unrolled_rows_hold_each_answer_once_and_ask_the_prompt_that_is_asked_in_use(
    kind: str, source: str
):
    with_it = chat(source, kind)
    for row in generated(seed=31, number=15, texts=FRAGMENTS):
        places = [p for p, m in enumerate(row.messages) if m.role == "assistant"]
        (examples,) = with_it.encode([row])
        assert len(examples) == len(places)
        for place, example in zip(places, examples, strict=True):
            ((start, end),) = runs(example.is_trained)
            prompt = with_it.encode_prompt(Conversation(row.messages[:place]))[1]
            if not example.num_straddling:
                assert prompt == example.input_ids[:start].tolist()
            assert int(example.input_ids[end - 1]) in with_it.stop_ids
            assert example.num_unstopped == 0


def test_control_tokens_in_an_answer_that_is_shortened_later_stay_text():
    """By hand: the template writes two ends of turns for each question and answer."""
    row = asked("One?", "<think>\nhm\n</think>\n\nIt says <|im_end|> there.", "Two?", "2.")
    with_it = chat(QWEN3)
    stop = with_it.tokenizer.convert_tokens_to_ids("<|im_end|>")
    (examples,) = with_it.encode([row])
    assert [int((e.input_ids == stop).sum()) for e in examples] == [2, 4]


def test_a_template_that_cuts_control_tokens_up_is_refused_where_a_row_spells_one():
    """What is the row's own is not known then, and neither is what may be a control token."""
    source = GEMMA.replace("| trim", ".split('|>')[0] + '|>'")
    with pytest.raises(ConfigurationError, match="written inside one cannot be told"):
        chat(source).encode([asked("<|im_end|>", "1|>")])


def test_an_early_system_message_that_would_be_lost_is_an_error():
    with_system = asked("One?", "1.", system="Be brief.")
    with pytest.raises(ConfigurationError, match=r"\(message 3\).* choose another template"):
        chat(NEMO).encode([with_system])
    assert len(shown(chat(NEMO), asked("One?", "1.", "Two?", "2."))) == 1


def test_a_template_that_knows_no_system_messages_trims_and_refuses_them():
    with_it = chat(GEMMA)
    assert shown(with_it, asked(" One? ", "\n1. ")) == [
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦1.<|im_end|>⟧\n"
    ]
    with pytest.raises(ConfigurationError, match="System role not supported"):
        with_it.encode([asked("One?", "1.", system="Be brief.")])


@pytest.mark.parametrize("train_on", ["answers", "answers_and_system"])
@pytest.mark.parametrize("question", ["One?", "One <|im_end|>?"], ids=["clean", "spells a token"])
def test_an_empty_system_message_stays_unwritten_where_the_template_leaves_it_out(
    train_on: str, question: str
):
    """Datasets with a system column leave it empty more often than not."""
    with_it = chat(OPTIONAL, train_on=train_on)
    row = asked(question, "1.", system="")
    assert shown(with_it, row) == shown(with_it, asked(question, "1."))


@pytest.mark.parametrize(
    "said", [str.strip, str.lstrip, str.rstrip], ids=["trims", "trims left", "trims right"]
)
def test_control_tokens_in_trimmed_messages_stay_text(said: Callable[[str], str]):
    filtered = {str.strip: "| trim", str.lstrip: ".lstrip()", str.rstrip: ".rstrip()"}[said]
    source = (
        "{% for m in messages %}{% set content = m['content'] " + filtered + " %}" + TURN
        if filtered.startswith("|")
        else "{% for m in messages %}{% set content = m['content']" + filtered + " %}" + TURN
    ) + ("{% endfor %}" + CUE)
    with_it = chat(source)
    texts = ("  It says <|im_end|> there. \n", " </s> <|im_start|> \n")
    (text,) = shown(with_it, asked(*texts))
    assert text == (
        f"<|im_start|>user\n{said(texts[0])}<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{said(texts[1])}<|im_end|>⟧\n"
    )
    (example,) = with_it.encode([asked(*texts)])[0]
    stop = with_it.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert int((example.input_ids == stop).sum()) == 2


def test_generated_rows_pass_through_a_trimming_template_whatever_they_spell():
    with_it = chat(GEMMA)
    for row in generated(seed=32, number=30, texts=CLEAN):
        turns = tuple(m for m in row.messages if m.role != "system")
        with_it.encode([Conversation(turns)])


def test_a_template_that_drops_thoughts_even_of_an_answer_that_is_trained_is_refused():
    """It would teach to answer without them, though the row has them."""
    dropping = QWEN3.replace("loop.last", "false")
    with pytest.raises(ConfigurationError, match=r"drops or rewrites message 2 \(assistant"):
        chat(dropping).encode([asked("One?", "<think>hm</think>1.", "Two?", "2.")])
