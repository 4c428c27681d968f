"""A conversation: pieces of text that add up to the answer, turns that fit, commands."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import Type

from qlora_pl.chat import terminal
from qlora_pl.chat.conversing import Chat
from qlora_pl.chat.streaming import TextStream, held_back
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.errors import DatasetFormatError
from qlora_pl.inference.loading import Model
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.answers.decoding import DecodingConfig

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # a run happens in this process

STOP = 99


# -- text as it comes ------------------------------------------------------------------------------


def streamed(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """Pieces of a text whose tokens are its bytes."""
    pieces: list[str] = []
    data = text.encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    stream = TextStream(decode, pieces.append, {STOP + 1000}, stop)
    stream.put(torch.tensor([[1, 2, 3]]))
    for byte in data:
        stream.put(torch.tensor([byte]))
    stream.end()
    return pieces


@pytest.mark.parametrize(
    "text", ["plain words", "naïve café", "日本語のテキスト", "emoji 👩‍👩‍👧 and 🏳️‍🌈", "a  b\n\nc "]
)
def test_pieces_add_up_and_hold_no_half_character(text: str) -> None:
    pieces = streamed(text)
    assert "".join(pieces) == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 2


def test_a_text_that_ends_an_answer_is_never_shown_not_even_begun() -> None:
    pieces = streamed("one two### Human: three", stop=("### Human",))
    assert "".join(pieces) == "one two"
    assert "".join(streamed("a # b ## c", stop=("### Human",))) == "a # b ## c"


def test_a_text_that_ends_an_answer_may_begin_it_with_a_line_break() -> None:
    assert streamed("\n\nHuman: three", stop=("\n\nHuman",)) == []
    assert "".join(streamed("\n\nHumane", stop=("\n\nHumans",))) == "Humane"


def test_what_may_still_change_is_held_back() -> None:
    assert held_back("word") == 0
    assert held_back("word ") == 1
    assert held_back("word\ufffd") == 1
    assert held_back("word##", ("### H",)) == 2
    assert held_back("word\n\n") == 2


# -- turns -----------------------------------------------------------------------------------------


def talk(model: Model, **settings: Any) -> Chat:
    return Chat(model, DecodingConfig(**{"max_new_tokens": 8} | settings), "adapter")


def test_the_pieces_are_the_answer_and_the_answer_is_remembered(model: Model) -> None:
    chat, pieces = talk(model), []
    answer = chat.ask("How many legs?", pieces.append)
    assert "".join(pieces) == answer.text
    assert [m.role for m in chat.turns] == ["user", "assistant"]
    chat.ask("And two?", pieces.append)
    _, ids = model.encoder.encode_prompt(conversation(["How many legs?", answer.text, "And two?"]))
    assert model.tokenizer.decode(ids).count("### Human:") == 2


def conversation(texts: list[str]) -> Conversation:
    return Conversation(
        tuple(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))
    )


def test_another_try_is_drawn_otherwise_and_a_seed_repeats_all_of_it(model: Model) -> None:
    def answers() -> list[str]:
        chat = talk(model, do_sample=True, temperature=2.0, seed=4)
        found = [chat.ask("How many legs?", lambda _: None).text]
        for _ in range(2):
            again = chat.retry(lambda _: None)
            assert again is not None
            found.append(again.text)
        assert len(chat.turns) == 2
        return found

    first = answers()
    assert len(set(first)) == 3
    assert answers() == first
    assert talk(model).retry(lambda _: None) is None


@pytest.mark.parametrize("is_asked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_hundred_turns_stay_within_what_the_model_reads(model: Model, is_asked: bool) -> None:
    """The tiny model reads 256 tokens; the system message stays."""
    chat = talk(model, max_new_tokens=4)
    chat.system = "Be brief."
    for turn in range(200):
        if is_asked:
            chat.ask(f"Question number {turn}?", lambda _: None)
        else:
            chat.turns += [Message("user", f"Question number {turn}?"), Message("assistant", "So.")]
    assert len(chat.turns) == 400
    chat.turns.append(Message("user", "Last?"))
    ids = chat._prompt()
    assert chat.num_forgotten > 350
    assert len(ids) + 4 <= 256
    text = model.tokenizer.decode(ids)
    assert "Be brief." in text
    assert "Last?" in text
    assert "number 199" in text


def test_a_message_that_is_too_long_is_told_and_forgotten(model: Model) -> None:
    chat = talk(model)
    with pytest.raises(DatasetFormatError, match=r"This has \d+ tokens .* may have 256"):
        chat.ask("long " * 300, lambda _: None)
    assert chat.turns == []
    assert chat.ask("short", lambda _: None).text is not None


def test_the_base_answers_when_it_is_asked(model: Model) -> None:
    chat = talk(model)
    own = chat.ask("How many legs?", lambda _: None).text
    chat.reset()
    chat.name = BASE
    assert chat.ask("How many legs?", lambda _: None).text != own


# -- the terminal ----------------------------------------------------------------------------------


def typed(type_in: Type, monkeypatch: pytest.MonkeyPatch, adapter: Path, *lines: str) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return type_in("chat", "--adapter", adapter, "--max-new-tokens", "6")


def test_commands_do_what_they_say(
    type_in: Type, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, said = typed(
        type_in, monkeypatch, adapter,
        "How many legs?", "/retry", "/adapter base", "/retry", "/adapter who", "/save talk.json",
        "/nonsense", "/system Be brief.", "/exit", "never asked",
    )  # fmt: skip
    assert code == 0
    answers = out.splitlines()
    assert answers[0] == answers[1] != answers[2]
    assert "There are adapter, base." in said
    assert said.count("A greedy answer comes again as it was") == 1  # not from the base
    assert "/reset         forget what was said" in said
    saved = json.loads(Path("talk.json").read_text())["messages"]
    assert [m["role"] for m in saved] == ["user", "assistant"]
    assert saved[1]["content"] == answers[2]


def test_ctrl_c_stops_an_answer_and_not_the_program(
    type_in: Type, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    generate = terminal.stopped_by_interrupt

    def press(*_: Any) -> Any:
        context = generate()

        class Pressing:
            def __enter__(self) -> Any:
                is_stopped = context.__enter__()
                signal.raise_signal(signal.SIGINT)
                return is_stopped

            def __exit__(self, *error: Any) -> None:
                context.__exit__(*error)

        return Pressing()

    monkeypatch.setattr(terminal, "stopped_by_interrupt", press)
    code, out, _ = typed(type_in, monkeypatch, adapter, "How many legs?", "/exit")
    assert code == 0
    assert len(out.strip()) < 12
    assert signal.getsignal(signal.SIGINT) is before


def test_beams_cannot_be_shown_as_they_come(type_in: Type, adapter: Path) -> None:
    code, _, said = type_in("chat", "--adapter", adapter, "--num-beams", "2")
    assert code == 2
    assert "--num-beams: a beam search knows its answer only at the end" in said
