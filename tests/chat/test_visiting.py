"""Tabs of a page without a browser: whose turn it is, who answers, what is shown of an answer."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from typing import Any

import pytest
import torch

from qlora_pl.chat.controls import Drawing, names_of
from qlora_pl.chat.conversing import Chat
from qlora_pl.chat.markup import as_html, as_markdown
from qlora_pl.chat.streaming import UNFINISHED
from qlora_pl.chat.visiting import Look, Visitor
from qlora_pl.chat.writing import Queue
from qlora_pl.data.conversation import Message
from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.inference.loading import Model
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import RowAnswer

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # a run happens in this process

BRIEF = DecodingConfig(max_new_tokens=6)


def visit(model: Model, *names: str, queue: Queue | None = None) -> Visitor:
    return Visitor(model, queue or Queue(), BRIEF, names or ["adapter"])


def ask(visitor: Visitor, text: str = "How many legs?", **settings: Any) -> list[Look]:
    decoding = DecodingConfig(**{"max_new_tokens": 6} | settings)
    return list(visitor.ask(text, decoding, None))


def contents(look: Look) -> list[list[str]]:
    return [[turn.content for turn in side] for side in look.sides]


# -- answers ---------------------------------------------------------------------------------------


def test_an_answer_grows_to_what_the_terminal_would_have_said(model: Model) -> None:
    looks = ask(visit(model), max_new_tokens=24)
    expected = Chat(model, DecodingConfig(max_new_tokens=24), "adapter")
    expected.ask("How many legs?", lambda _: None)
    assert looks[-1].sides == [expected.turns]
    texts = [side[-1].content for (side,) in (look.sides for look in looks) if len(side) == 2]
    assert all(b.startswith(a) for a, b in pairwise(texts))
    assert looks[0].sides[0][0] == Message("user", "How many legs?")
    assert "24 tokens in" in looks[-1].said
    assert "Cut at the length" in looks[-1].said


def test_both_sides_answer_the_same_question_as_they_would_alone(model: Model) -> None:
    visitor = visit(model, "adapter", BASE)
    both = contents(ask(visitor)[-1])
    assert both[0] == contents(ask(visit(model, "adapter"))[-1])[0]
    assert both[1] == contents(ask(visit(model, BASE))[-1])[0]
    assert both[0] != both[1]
    lines = [json.loads(line)["messages"] for line in visitor.as_lines().splitlines()]
    assert [[m["content"] for m in line] for line in lines] == both


def test_who_joins_goes_on_from_the_first_and_who_was_there_from_their_own(model: Model) -> None:
    visitor = visit(model)
    ask(visitor)
    visitor.choose(["adapter", BASE])
    ask(visitor, "And two?")
    first, second = visitor.chats
    assert first.turns[:2] == second.turns[:2]
    assert second.inherited == ["adapter", "adapter"]
    assert first.turns[3] != second.turns[3]
    visitor.choose([BASE])
    assert visitor.chats == [second]
    visitor.clear()
    assert (second.turns, second.inherited) == ([], [])


def test_another_try_replaces_the_answer_of_every_side(model: Model) -> None:
    visitor = visit(model, "adapter", BASE)
    ask(visitor, do_sample=True, temperature=2.0)
    before = [chat.turns[-1] for chat in visitor.chats]
    sampled = DecodingConfig(max_new_tokens=6, do_sample=True, temperature=2.0)
    looks = list(visitor.retry(sampled, None))
    assert [len(side) for side in looks[0].sides] == [1, 1]
    assert [len(chat.turns) for chat in visitor.chats] == [2, 2]
    assert all(a != chat.turns[-1] for a, chat in zip(before, visitor.chats, strict=True))
    assert "comes out the same" not in looks[-1].said
    assert "comes out the same" in list(visitor.retry(BRIEF, None))[-1].said


def test_with_nothing_asked_there_is_nothing_to_try_again_or_to_save(model: Model) -> None:
    visitor = visit(model)
    assert list(visitor.retry(BRIEF, None))[-1] == Look([[]])
    assert visitor.as_lines() == ""


def test_a_stop_keeps_what_is_there_and_the_next_question_is_answered(model: Model) -> None:
    visitor = visit(model, "adapter", BASE)
    looks = []
    for look in visitor.ask("How many legs?", DecodingConfig(max_new_tokens=200), None):
        looks.append(look)
        if len(look.sides[0]) == 2:
            visitor.stop()
    assert "Stopped." in looks[-1].said
    kept, unanswered = looks[-1].sides
    assert kept[-1].role == "assistant"
    assert unanswered == [Message("user", "How many legs?")]  # whose turn had not come
    ask(visitor, "And two?")
    assert [m.content for m in visitor.chats[1].turns][:1] == ["And two?"]
    assert [m.role for m in visitor.chats[0].turns] == ["user", "assistant"] * 2


def test_a_question_without_room_changes_nothing_on_either_side(model: Model) -> None:
    visitor = visit(model, "adapter", BASE)
    ask(visitor)
    before = visitor.look()
    (refused,) = [look for look in ask(visitor, "long " * 300) if look.is_refused]
    assert "may have 256; say it in fewer words" in refused.said
    assert refused.sides == before.sides == visitor.look().sides


def test_trimming_is_said_as_in_the_terminal(model: Model) -> None:
    visitor = visit(model)
    (chat,) = visitor.chats
    chat.turns = [Message("user", "Question?"), Message("assistant", "So.")] * 40
    said = ask(visitor)[-1].said
    assert f"The oldest {chat.num_forgotten} messages had no room and were left out." in said
    assert chat.num_forgotten > 40


def test_memory_that_runs_out_is_one_sentence_and_costs_no_conversation(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = visit(model)
    ask(visitor)
    before = visitor.look().sides

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("qlora_pl.chat.conversing.answer_batch", full)
    look = ask(visitor, "And two?")[-1]
    assert look.said.startswith("The conversation does not fit into memory; begin a new one")
    assert (look.is_refused, look.sides) == (True, before)
    with pytest.raises(HardwareError):
        visitor.chats[0].retry(lambda _: None)
    assert visitor.look().sides == before


def test_an_answer_that_is_cut_within_a_character_keeps_no_half_of_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qlora_pl.chat.conversing.answer_batch",
        lambda *_, **__: [RowAnswer([1], f"caf{UNFINISHED}", "length")],
    )
    assert Chat(model, BRIEF, "adapter").ask("?", lambda _: None).text == "caf"


# -- one model, several tabs -----------------------------------------------------------------------


def test_tabs_are_answered_one_after_the_other_and_know_nothing_of_each_other(model: Model) -> None:
    queue = Queue()
    first, second = visit(model, queue=queue), visit(model, BASE, queue=queue)
    writing = first.ask("How many legs?", DecodingConfig(max_new_tokens=60), None)
    next(writing)
    waiting = second.ask("And two?", BRIEF, None)
    assert next(waiting).said == "Waiting for one other answer."
    *_, last = waiting
    *_, own = writing
    assert "And two?" not in str(own)
    assert contents(last) == contents(ask(visit(model, BASE), "And two?")[-1])


def test_a_tab_that_is_closed_stops_its_answer_and_frees_the_model(model: Model) -> None:
    queue = Queue()
    closed = visit(model, queue=queue)
    looks = closed.ask("How many legs?", DecodingConfig(max_new_tokens=200), None)
    next(looks)
    looks.close()  # what Gradio does with a generator that nobody reads
    assert (
        closed.look().sides == [[Message("user", "How many legs?")]]
        or len(model.tokenizer(closed.chats[0].turns[-1].content)["input_ids"]) < 100
    )
    ticket = queue.join()
    assert queue.num_before(ticket) == 0
    queue.leave(ticket)


def test_whoever_gives_up_waiting_leaves_the_queue(model: Model) -> None:
    queue = Queue()
    ticket = queue.join()  # never served
    visitor = visit(model, queue=queue)
    looks = visitor.ask("How many legs?", BRIEF, None)
    assert next(looks).said == "Waiting for one other answer."
    visitor.stop()
    *_, last = looks
    assert last.sides == [[Message("user", "How many legs?")]]
    queue.leave(ticket)
    assert ask(visitor)[-1].sides[0][-1].role == "assistant"


def test_a_second_question_before_the_end_of_an_answer_is_refused(model: Model) -> None:
    visitor = visit(model)
    writing = visitor.ask("How many legs?", DecodingConfig(max_new_tokens=100), None)
    next(writing)
    (refused,) = ask(visitor, "And two?")
    assert refused.is_refused
    assert refused.said.startswith("An answer is being written")
    with pytest.raises(ConfigurationError, match="An answer is being written"):
        visitor.choose([BASE])
    clearing = threading.Thread(target=visitor.clear)
    clearing.start()  # stops the answer, and waits for its end
    deadline = time.monotonic() + 30
    for _ in writing:
        assert time.monotonic() < deadline
    clearing.join()
    assert visitor.look().sides == [[]]


# -- what the controls say -------------------------------------------------------------------------

AT_REST = {
    "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40.0,
    "repetition_penalty": 1.1, "max_new_tokens": 64.0,
}  # fmt: skip


def test_controls_and_flags_make_one_configuration() -> None:
    given = DecodingConfig(seed=3, stop=("###",), typical_p=0.5, do_sample=True, min_new_tokens=99)
    drawn = Drawing(**AT_REST).config(given)
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.typical_p) == (0.7, 0.9, 40, 0.5)
    assert (drawn.seed, drawn.stop, drawn.repetition_penalty) == (3, ("###",), 1.1)
    assert (drawn.max_new_tokens, drawn.min_new_tokens) == (64, 64)
    greedy = Drawing(**AT_REST | {"do_sample": False}).config(given)
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.typical_p) == (1.0, 1.0, 0, 1.0)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("temperature", 0, "decoding.temperature: must be above 0, got 0."),
        ("top_p", 0, "decoding.top_p: must lie above 0, up to 1, got 0."),
        ("top_k", -1, "decoding.top_k: must be 0 or more, got -1."),
        ("max_new_tokens", 0, "decoding.max_new_tokens: must be at least 1, got 0."),
        ("repetition_penalty", 0, "decoding.repetition_penalty: must be above 0, got 0."),
        ("temperature", None, "decoding.temperature: is empty; give a number."),
    ],
)
def test_what_cannot_be_is_told_as_in_the_command(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as told:
        Drawing(**AT_REST | {name: value}).config(DecodingConfig())
    assert str(told.value) == sentence


def test_who_answers() -> None:
    two = ["old", "new"]
    assert names_of([], "on", None, BASE) == [BASE]
    assert names_of(["adapter"], "on", None, BASE) == ["adapter"]
    assert names_of(["adapter"], "off", "adapter", BASE) == [BASE]
    assert names_of(["adapter"], "side by side", None, BASE) == ["adapter", BASE]
    assert names_of(two, "side by side", "new", "old") == ["new", "old"]
    assert names_of(two, "side by side", "new", "new") == ["new"]


# -- what is shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a < b", "a &lt; b"),
        ("<script>run()</script>", "&lt;script>run()&lt;/script>"),
        ("![pic](http://x/y.png)", "&#33;[pic](http://x/y.png)"),
        ("`<b>` is <b>", "`<b>` is &lt;b>"),
        ("``a ` <b>`` <i>", "``a ` <b>`` &lt;i>"),
        ("```html\n<b>\n```\n<b>", "```html\n<b>\n```\n&lt;b>"),
        ("~~~\n<b>\n```\n<b>\n~~~\n<i>", "~~~\n<b>\n```\n<b>\n~~~\n&lt;i>"),
        ("```\n<b> as it is being wri", "```\n<b> as it is being wri"),
        ("```<b>``` <i>", "```<b>``` &lt;i>"),
        ("one ` tick <b>", "one ` tick &lt;b>"),
        ("```mermaid\ngraph TD; A-->B\n```", "```text\ngraph TD; A-->B\n```"),
        ("> ~~~ Mermaid\n> <img src=x>", "> ~~~ text\n> &lt;img src=x>"),
    ],
)
def test_tags_are_text_and_code_is_code(text: str, shown: str) -> None:
    assert as_markdown(text) == shown


def test_sentences_are_text() -> None:
    assert as_html("<b> & 'c'\nnext") == "&lt;b&gt; &amp; &#x27;c&#x27;<br>next"
