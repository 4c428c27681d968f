"""Answers do not depend on how prompts are batched, and come in the order they were asked."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.inference.answering import Answer, Answerer, TooLong
from qlora_pl.inference.loading import Model
from qlora_pl.inference.prompts import Prompt
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.answers.decoding import DecodingConfig

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

QUESTIONS = [
    *(f"What is the capital of {name}?" for name in ("France", "Chad", "the Netherlands")),
    "How many legs has a spider?",
    "How many legs have two spiders and a beetle together?",
    "Say it.",
    "x",
    "Why?",
    "a " * 30,
]


def prompts(questions: list[str] = QUESTIONS) -> list[Prompt]:
    return [
        Prompt(row, Conversation((Message("user", question),)), {"prompt": question}, f"row {row}")
        for row, question in enumerate(questions)
    ]


def ask(model: Model, batch_size: int = 8, names: tuple[str, ...] = ("adapter",), **s: Any) -> Any:
    config = DecodingConfig(**{"max_new_tokens": 10} | s)
    return list(Answerer(model, config, batch_size).answers(prompts(), names))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"num_beams": 2},
        {"stop": ("e",)},
    ],
    ids=str,
)
def test_an_answer_is_the_same_at_any_batch_size(model: Model, settings: dict[str, Any]) -> None:
    """Float32 on a CPU; products of other shapes differ in the last bits, no answer here does."""
    alone = ask(model, 1, **settings)
    assert [a.row for a in alone] == list(range(len(QUESTIONS)))
    for batch_size in (2, 4, 32):
        batched = ask(model, batch_size, **settings)
        assert [(a.answer, a.stop_reason) for a in batched] == [
            (a.answer, a.stop_reason) for a in alone
        ]
    assert len({a.answer for a in alone}) > 3


def test_the_prompt_is_that_of_training(model: Model) -> None:
    (answer, *_) = ask(model)
    assert answer.prompt == f"### Human: {QUESTIONS[0]}### Assistant:"
    encoder = model.encoder
    ids = encoder.encode_prompt(Conversation((Message("user", QUESTIONS[0]),)))[1]
    assert answer.prompt_tokens == len(ids)


def test_adapter_and_base_answer_each_prompt_in_turn(model: Model) -> None:
    answers = ask(model, names=("adapter", BASE))
    assert [(a.row, a.adapter) for a in answers] == [
        (row, name) for row in range(len(QUESTIONS)) for name in ("adapter", BASE)
    ]
    one = [a.answer for a in answers if a.adapter == "adapter"]
    other = [a.answer for a in answers if a.adapter == BASE]
    assert one == [a.answer for a in ask(model)]
    assert other == [a.answer for a in ask(model, names=(BASE,))]
    assert one != other


def test_answers_come_window_by_window_so_that_a_long_file_does_not_wait(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_pl.inference import answering

    monkeypatch.setattr(answering, "BATCHES_AHEAD", 1)
    asked = Answerer(model, DecodingConfig(max_new_tokens=2), 2)
    seen: list[int] = []
    generate = asked._generate

    def count(current: Any, batch: Any, should_stop: Any) -> Any:
        seen.append(len(batch))
        return generate(current, batch, should_stop)

    monkeypatch.setattr(asked, "_generate", count)
    answers = asked.answers(prompts(), ("adapter",))
    first = next(answers)
    assert isinstance(first, Answer)
    assert seen == [2]


def test_a_raw_question_is_read_as_it_is(model: Model) -> None:
    asked = Answerer(model, DecodingConfig(max_new_tokens=2), is_raw=True)
    (answer,) = asked.answers(prompts(["Once upon"]), ("adapter",))
    assert isinstance(answer, Answer)
    assert answer.prompt == "Once upon"
    assert answer.prompt_tokens == len(model.tokenizer("Once upon")["input_ids"])


def test_a_prompt_that_leaves_no_room_is_told_by_its_place_and_length(model: Model) -> None:
    """The tiny model reads 256 tokens."""
    asked = Answerer(model, DecodingConfig())
    found = list(asked.answers(prompts(["short", "long " * 300, "short"]), ("adapter",)))
    assert [type(one) for one in found] == [Answer, TooLong, Answer]
    assert "row 1: the prompt has " in found[1].sentence
    assert "together may have 256; shorten it." in found[1].sentence


def test_a_batch_that_does_not_fit_is_asked_in_halves(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    expected = [a.answer for a in ask(model, 4)]
    asked = Answerer(model, DecodingConfig(max_new_tokens=10), 4)
    generate = asked._generate

    def fail(current: Any, batch: Any, should_stop: Any) -> Any:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("injected")
        return generate(current, batch, should_stop)

    monkeypatch.setattr(asked, "_generate", fail)
    found = list(asked.answers(prompts(), ("adapter",)))
    assert [a.answer for a in found] == expected
    assert asked.batch_size == 2


def test_an_answer_is_cut_where_somebody_says_stop(model: Model) -> None:
    count = iter(range(100))
    asked = Answerer(model, DecodingConfig(max_new_tokens=50), 32)
    found = list(asked.answers(prompts(), ("adapter",), should_stop=lambda: next(count) > 3))
    assert {a.stop_reason for a in found} <= {"interrupted", "stop_token"}
    assert all(a.answer_tokens <= 6 for a in found)
