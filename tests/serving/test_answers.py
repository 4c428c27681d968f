"""What OpenAI's own client gets is what ``qlora_pl.generate`` gives, whole and in pieces."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

import qlora_pl

from .conftest import Served, serving

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # a run happens in this process

QUESTION = [{"role": "user", "content": "How many legs?"}]
DRAWN = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "It has eight legs."},
    {"role": "user", "content": "And two?"},
]


def ask(client: openai.OpenAI, messages: Any = None, model: str = "small", **words: Any) -> Any:
    return client.chat.completions.create(model=model, messages=messages or QUESTION, **words)


def streamed(client: openai.OpenAI, **words: Any) -> tuple[list[str], list[str | None], Any]:
    """Pieces, reasons and usage of a streamed answer."""
    pieces, reasons, usage = [], [], None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **words):
        if chunk.choices:
            pieces.append(chunk.choices[0].delta.content or "")
            reasons.append(chunk.choices[0].finish_reason)
            assert chunk.usage is None
        else:
            usage = chunk.usage
    return pieces, reasons, usage


@pytest.mark.parametrize("messages", [QUESTION, TALK], ids=["question", "talk"])
@pytest.mark.parametrize("settings", [{}, DRAWN], ids=["greedy", "drawn"])
def test_streamed_and_whole_are_what_generate_gives(
    served: Served, client: openai.OpenAI, messages: Any, settings: dict[str, Any]
) -> None:
    drawn = {"do_sample": True, **settings} if settings else {}
    prompt = {"messages": messages}
    (expected,) = qlora_pl.generate(
        served.model, [prompt], adapter="small", max_new_tokens=10, **drawn
    )
    whole = ask(client, messages, **settings)
    (choice,) = whole.choices
    assert choice.message.content == expected.answer
    assert choice.message.role == "assistant"
    assert choice.finish_reason == {"length": "length"}.get(expected.stop_reason, "stop")
    assert whole.usage.prompt_tokens == expected.prompt_tokens
    assert whole.usage.completion_tokens == expected.answer_tokens
    assert whole.usage.total_tokens == expected.prompt_tokens + expected.answer_tokens
    assert whole.model == "small"
    pieces, reasons, usage = streamed(client, messages=messages, **settings)
    assert "".join(pieces) == expected.answer
    assert [one for one in reasons if one] == [choice.finish_reason]
    assert usage == whole.usage


def test_pieces_come_one_by_one_and_add_up_to_bytes_that_are_no_characters(
    client: openai.OpenAI,
) -> None:
    """The tiny model writes bytes at random, of which most are parts of characters."""
    pieces, _, _ = streamed(client, max_tokens=60, temperature=2.0, seed=3)
    whole = ask(client, max_tokens=60, temperature=2.0, seed=3).choices[0].message.content
    assert "".join(pieces) == whole
    assert "\ufffd" in whole
    assert len([one for one in pieces if one]) > 10


def test_a_seed_repeats_an_answer_and_without_one_answers_differ(client: openai.OpenAI) -> None:
    def text(**words: Any) -> str:
        found: str = ask(client, temperature=2.0, **words).choices[0].message.content
        return found

    assert text(seed=5) == text(seed=5) != text(seed=6)
    assert len({text() for _ in range(4)}) == 4


def test_an_answer_is_greedy_unless_drawing_is_asked_for(client: openai.OpenAI) -> None:
    greedy = ask(client).choices[0].message.content
    assert ask(client, temperature=0).choices[0].message.content == greedy
    assert ask(client, temperature=0, top_p=0.5, seed=9).choices[0].message.content == greedy
    assert ask(client, top_p=1.0, seed=4).choices[0].message.content != greedy


def test_n_answers_are_those_of_n_rows_whole_and_streamed(
    served: Served, client: openai.OpenAI
) -> None:
    settings = {"temperature": 1.5, "seed": 7}
    rows = qlora_pl.generate(
        served.model, ["How many legs?"] * 3, adapter="small", max_new_tokens=10, do_sample=True,
        **settings,
    )  # fmt: skip
    whole = ask(client, n=3, **settings)
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [row.answer for row in rows]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == sum(row.answer_tokens for row in rows)
    assert whole.usage.prompt_tokens == rows[0].prompt_tokens
    found = ["", "", ""]
    for chunk in ask(client, n=3, stream=True, **settings):
        for choice in chunk.choices:
            found[choice.index] += choice.delta.content or ""
    assert found == texts


def test_the_model_is_chosen_by_its_name(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small", "other", "base"]
    assert client.models.retrieve("base").id == "base"
    texts = {name: ask(client, model=name).choices[0].message.content for name in ("small", "base")}
    for name, text in texts.items():
        (expected,) = qlora_pl.generate(
            served.model, "How many legs?", adapter=name, max_new_tokens=10
        )
        assert text == expected.answer
    assert texts["small"] != texts["base"]


@pytest.mark.parametrize("is_list", [False, True])
def test_an_answer_ends_before_a_stop_text_and_says_so(
    client: openai.OpenAI, is_list: bool
) -> None:
    whole = ask(client, max_tokens=40).choices[0].message.content
    mark = whole[4:6]
    stop = [mark, "never said"] if is_list else mark
    cut = ask(client, max_tokens=40, stop=stop)
    assert cut.choices[0].message.content == whole[: whole.index(mark)].strip()
    assert cut.choices[0].finish_reason == "stop"
    pieces, reasons, usage = streamed(client, max_tokens=40, stop=stop)
    assert "".join(pieces) == cut.choices[0].message.content
    assert reasons[-1] == "stop"
    assert usage == cut.usage


def test_a_raw_text_is_gone_on_with(served: Served, client: openai.OpenAI) -> None:
    texts = ["Once upon", "The capital of France"]
    rows = qlora_pl.generate(served.model, texts, adapter="small", raw=True, max_new_tokens=10)
    found = client.completions.create(model="small", prompt=texts)
    assert [choice.text for choice in found.choices] == [row.answer for row in rows]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(row.prompt_tokens for row in rows)
    pieces = client.completions.create(model="small", prompt=texts[0], stream=True)
    assert "".join(one.choices[0].text for one in pieces) == rows[0].answer


def test_clients_at_once_get_what_each_would_get_alone(served: Served) -> None:
    """Twelve clients, adapter and base, greedy and drawn, streamed and whole, on twelve threads."""

    def one(number: int) -> str:
        words: dict[str, Any] = {"max_tokens": 12, "model": ("small", "base")[number % 2]}
        words["messages"] = [{"role": "user", "content": "legs? " * (1 + number % 5)}]
        if number % 3 == 0:
            words |= {"temperature": 1.2, "seed": number}
        with served.client() as client:
            if number % 4 == 0:
                return "".join(streamed(client, **words)[0])
            found: str = ask(client, **words).choices[0].message.content
            return found

    alone = [one(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(one, range(12)))
    assert together == alone
    assert len(set(alone)) > 6


def test_requests_that_wait_are_answered_in_one_batch(
    own_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_pl.serving import engine

    sizes: list[int] = []
    answer = engine.answer_batch

    def count(*given: Any, **words: Any) -> Any:
        sizes.append(len(given[2]))
        return answer(*given, **words)

    monkeypatch.setattr(engine, "answer_batch", count)
    with serving(own_model, batch_size=4, max_new_tokens=30) as running, ThreadPoolExecutor(9) as p:
        calls = [p.submit(ask, running.client()) for _ in range(9)]
        assert len({call.result().choices[0].message.content for call in calls}) == 1
    assert sum(sizes) == 9
    assert max(sizes) > 1
    assert max(sizes) <= 4


def test_what_a_request_leaves_out_is_as_the_server_was_started(own_model: Any) -> None:
    decoding = {"do_sample": True, "temperature": 1.5, "seed": 3, "max_new_tokens": 7}
    (expected,) = qlora_pl.generate(own_model, "How many legs?", adapter="small", **decoding)
    with serving(own_model, is_seeded=True, **decoding) as running, running.client() as client:
        assert ask(client).choices[0].message.content == expected.answer
        greedy = ask(client, temperature=0).choices[0].message.content
    (expected,) = qlora_pl.generate(own_model, "How many legs?", adapter="small", max_new_tokens=7)
    assert greedy == expected.answer
