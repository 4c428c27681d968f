"""From rows as they are published to conversations, and sentences about rows that are not so."""

from __future__ import annotations

from typing import Any

import pytest
from toy_tokenizers import TEXTS, asked

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.reading.formats import FORMATS, RowError, guess_format
from qlora_pl.data.reading.turns import SPEAKERS
from qlora_pl.errors import ConfigurationError

ROWS: list[tuple[str, dict[str, Any], Conversation]] = [
    ("alpaca", {"instruction": "q", "output": "a"}, asked("q", "a")),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, asked("q", "a")),
    ("alpaca", {"instruction": "q", "input": None, "output": "a"}, asked("q", "a")),
    (
        "alpaca",
        {"instruction": "q", "input": "c", "output": "a", "text": "unused"},
        Conversation((Message("user", "q", context="c"), Message("assistant", "a"))),
    ),
    ("prompt-response", {"prompt": "q", "response": "a"}, asked("q", "a")),
    ("prompt-completion", {"prompt": "q", "completion": "a"}, asked("q", "a")),
    ("question-answer", {"question": "q", "answer": "a"}, asked("q", "a")),
    ("input-output", {"input": "q", "output": "a"}, asked("q", "a")),
    ("input-output", {"input": "", "output": "a"}, Conversation.from_text("a")),
    ("input-output", {"output": "a"}, Conversation.from_text("a")),
    ("text", {"text": "a"}, Conversation.from_text("a")),
    (
        "guanaco",
        {"text": "### Human: q### Assistant: a### Human: r### Assistant: b"},
        asked("q", "a", "r", "b"),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
        asked("q", "a", system="s"),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        asked("q", "a"),
    ),
    (
        "messages",
        {"messages": ({"role": "prompter", "content": "q"}, {"role": "bot", "content": "a"})},
        asked("q", "a"),
    ),
]


@pytest.mark.parametrize(("name", "row", "conversation"), ROWS)
def test_a_row_becomes_its_conversation(name: str, row: Any, conversation: Conversation):
    assert FORMATS[name].convert(row) == conversation
    assert conversation.problem() is None


@pytest.mark.parametrize("text", TEXTS)
def test_no_format_touches_a_character_of_the_text(text: str):
    rows = {
        "alpaca": {"instruction": text, "input": text, "output": text},
        "prompt-response": {"prompt": text, "response": text},
        "prompt-completion": {"prompt": text, "completion": text},
        "question-answer": {"question": text, "answer": text},
        "input-output": {"input": text, "output": text},
        "text": {"text": text},
        "messages": {"messages": [{"role": role, "content": text} for role in ("user", "bot")]},
        "sharegpt": {"conversations": [{"from": by, "value": text} for by in ("human", "gpt")]},
        "vicuna": {"conversations": [{"from": by, "value": text} for by in ("human", "gpt")]},
        "oasst": {"messages": [{"role": role, "content": text} for role in ("user", "bot")]},
        "dolly": {"instruction": text, "context": text, "response": text},
        "natural-instructions": {"definition": text, "inputs": text, "targets": text},
        "inputs-targets": {"inputs": text, "targets": text},
        "source-target": {"source": text, "target": text},
        "unnatural-instructions": {"instruction_with_input": text, "output": text},
        "unnatural-instructions-full": {"instruction_with_input": text, "output": text},
    }
    cut = {"guanaco", "chip2", "hh-rlhf"}  # whose turns are cut out of one text
    assert set(rows) == set(FORMATS) - cut
    for name, row in rows.items():
        for message in FORMATS[name].convert(row).messages:
            assert message.content == text
            assert message.context in ("", text)


@pytest.mark.parametrize(
    ("columns", "format_and_runner_up"),
    [
        (["instruction", "output"], ("alpaca", None)),
        (["output", "input", "instruction", "text"], ("alpaca", "input-output")),
        (["prompt", "response", "id"], ("prompt-response", None)),
        (["prompt", "completion"], ("prompt-completion", None)),
        (["question", "answer"], ("question-answer", None)),
        (["input", "output"], ("input-output", None)),
        (["messages", "prompt", "response"], ("messages", "prompt-response")),
        (["conversations"], ("sharegpt", "vicuna")),
        (["instruction", "context", "response", "category"], ("dolly", None)),
        (["inputs", "targets", "task"], ("inputs-targets", None)),
        (["definition", "inputs", "targets"], ("natural-instructions", "inputs-targets")),
        (["source", "target"], ("source-target", None)),
        (["chosen", "rejected"], ("hh-rlhf", None)),
        (["message_id", "parent_id", "text", "role", "lang"], ("oasst", "text")),
        (["message_tree_id", "tree_state", "prompt"], ("oasst", None)),
        (["instruction", "instances"], ("unnatural-instructions", None)),
        (
            ["instruction", "instances", "reformulations"],
            ("unnatural-instructions", "unnatural-instructions-full"),
        ),
        (["text"], ("text", "guanaco")),
    ],
)
def test_columns_tell_the_format_and_the_runner_up(
    columns: list[str], format_and_runner_up: tuple[str, str | None]
):
    assert guess_format(columns) == format_and_runner_up


def test_unknown_columns_are_listed_with_what_would_fit():
    with pytest.raises(ConfigurationError) as caught:
        guess_format(["instruction", "response"])
    assert "no format fits the columns 'instruction', 'response'" in str(caught.value)
    assert "alpaca: instruction + output" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        (
            "alpaca",
            {"instruction": "q", "response": "a", "context": "c"},
            "no 'output' field; found 'instruction', 'response', 'context'",
        ),
        ("alpaca", {"instruction": "q", "output": None}, "'output' is null; found 'instruction'"),
        ("text", {"text": None}, "'text' is null; found nothing"),
        (
            "prompt-response",
            {"prompt": "q", "response": 5},
            "'response' holds int 5, expected text",
        ),
        ("alpaca", {"instruction": "q", "input": 1.5, "output": "a"}, "'input' holds float 1.5"),
        ("messages", {"prompt": "q"}, "no 'messages' field; found 'prompt'"),
        ("messages", {"messages": "q"}, "'messages' holds str, expected a list of messages"),
        ("messages", {"messages": ["q"]}, "'messages' item 1 is str, expected a mapping"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "a"}]},
            "'messages' item 2 is from 'tool' and calls a tool or answers for it",
        ),
        ("messages", {"messages": [{"content": "q"}]}, "'messages' item 1 has no 'role'"),
        (
            "messages",
            {"messages": [{"role": "user", "content": None}]},
            "'messages' item 1: 'content' is null; found 'role'",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt"}]},
            "'conversations' item 1: no 'value' field; found 'from'",
        ),
        (
            "prompt-response",
            {"prompt": "q", "response": "half a pair \ud83d"},
            "'response' holds half of a surrogate pair",
        ),
    ],
)
def test_a_row_that_is_not_what_its_format_says_is_described(name: str, row: Any, sentence: str):
    with pytest.raises(RowError) as caught:
        FORMATS[name].convert(row)
    assert sentence in str(caught.value)


def test_a_long_value_is_quoted_in_part():
    with pytest.raises(RowError) as caught:
        FORMATS["text"].convert({"text": list(range(10_000))})
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("conversation", "clause"),
    [
        (Conversation(()), "it has no messages"),
        (asked("q"), "it ends with a question, so there is nothing to learn"),
        (asked("q", ""), "its answer (message 2) is empty"),
        (asked("q", "\n \t"), "its answer (message 2) is empty"),
        (asked("q", " ", "q", "a"), "its answer (message 2) is empty"),
        (Conversation.from_text(" \n"), "its text is empty"),
        (Conversation((Message("assistant", "a"),)), "message 1 is from 'assistant', expected"),
        (
            Conversation((Message("user", "q"), Message("user", "q"), Message("assistant", "a"))),
            "message 2 is from 'user', expected 'assistant'",
        ),
        (
            Conversation((Message("user", "q"), Message("system", "s"), Message("assistant", "a"))),
            "message 2 is from 'system', which only the first may be",
        ),
    ],
)
def test_a_conversation_that_teaches_nothing_is_described(conversation: Conversation, clause: str):
    assert clause in str(conversation.problem())


def test_prompt_and_reference_split_a_conversation_at_its_last_answer():
    row = asked("one", "1", "two", "2", system="s")
    assert row.prompt == asked("one", "1", "two", system="s")
    assert row.reference == "2"
    assert asked("one").prompt == asked("one")
    assert asked("one").reference == ""


def test_every_speaker_has_a_role_that_templates_know():
    assert set(SPEAKERS.values()) == {"system", "user", "assistant"}
