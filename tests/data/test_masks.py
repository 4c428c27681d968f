"""What reaches the loss, over published tokenizers, every template and rows that spell tokens.

Ids are read back with ``spell``, by the vocabulary alone. The wording around an answer is written
out here; where in the row an answer is comes from the rendered prompt before it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from generated_rows import CLEAN, KINDS, encoder, generated, has_tokens_of, tokenizer
from toy_tokenizers import asked, spell

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import EncodedExample, Encoder
from qlora_pl.data.templates.wording import TEXT_TEMPLATES

CUSTOM = {
    "name": "custom",
    "system": "[{content}]\n",
    "question": "Q{{1}}: {content}\n",
    "question_with_context": "Q: {content} ({context})\n",
    "answer_cue": "A:\n",
    "answer": "{content}!",
    "separator": "\n--\n",
}
JINJA = {  # trims, and writes BOS and EOS as the tokenizer has them
    "jinja": "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
}
TEMPLATES: dict[str, Any] = {name: name for name in (*TEXT_TEMPLATES, "chat")}
TEMPLATES |= {"custom": CUSTOM, "jinja": JINJA}
CASES = [(k, t) for k in KINDS for t in TEMPLATES if has_tokens_of(k, t)]
every_case = pytest.mark.parametrize(("kind", "template"), CASES)


class Wording(NamedTuple):
    """What a template writes around an answer, by hand."""

    before: str
    after: str
    stop: str
    trims: bool = False


def wording(kind: str, template: str) -> Wording:
    """By the sources that ``test_templates`` names; ``chat`` is each tokenizer's own."""
    eos = tokenizer(kind).eos_token
    if template == "chat":
        template = {"mistral": "inst", "mistral3": "inst", "llama3": "llama3-chat"}.get(
            kind, "chatml"
        )
    return {
        "alpaca": Wording(" ", "", eos),
        "instruction-response": Wording("", "", eos),
        "plain": Wording(" ", "", eos),
        "guanaco": Wording(" ", "", eos),
        "vicuna": Wording(" ", "", eos),
        "chatml": Wording("", "", "<|im_end|>"),
        "llama2": Wording(" ", " ", eos),
        "llama3": Wording("", "", "<|eot_id|>"),
        "llama3-chat": Wording("", "", "<|eot_id|>", trims=True),
        "inst": Wording(" ", "", eos),
        "custom": Wording("", "!", eos),
        "jinja": Wording(" ", "", eos, trims=True),
    }[template]


def expected(kind: str, template: str, content: str) -> str:
    """An answer as it is to be learnt, up to and with its stop token."""
    before, after, stop, trims = wording(kind, template)
    text = before + (content.strip() if trims else content) + after
    return (unicodedata.normalize("NFC", text) if kind == "qwen" else text) + stop


def runs(chosen: np.ndarray) -> list[tuple[int, int]]:
    """Where stretches of True begin and end."""
    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def answers(conversation: Conversation) -> list[int]:
    return [p for p, m in enumerate(conversation.messages) if m.role == "assistant"]


def without_spaces(text: str) -> str:
    """SentencePiece puts some of its own behind control tokens."""
    return text.replace(" ", "")


@cache
def rows(seed: int = 7, number: int = 24) -> list[Conversation]:
    return generated(seed, number)


class Case(NamedTuple):
    """A row, the conversation up to its end, and where its trained answers are."""

    conversation: Conversation
    example: EncodedExample
    places: list[int]


def cases(with_it: Encoder, some: list[Conversation]) -> Iterator[Case]:
    """A conversation that became several rows ends with another answer in each."""
    for conversation, examples in zip(some, with_it.encode(some), strict=True):
        places = answers(conversation)
        if len(examples) == 1:
            yield Case(conversation, examples[0], places)
            continue
        for place, example in zip(places, examples, strict=True):
            yield Case(Conversation(conversation.messages[: place + 1]), example, [place])


def check(kind: str, template: str, with_it: Encoder, case: Case) -> int:
    """Each span of trained tokens is the answer of its place; counts those with more in front."""
    row, (ids, is_trained, *_), places = case
    spans = runs(is_trained)
    assert len(spans) == len(places)
    num_longer = 0
    stop = tokenizer(kind).convert_tokens_to_ids(wording(kind, template).stop)
    for (start, end), place in zip(spans, places, strict=True):
        learnt = spell(with_it.tokenizer, ids[start:end])
        answer = expected(kind, template, row.messages[place].content)
        assert learnt.endswith(answer)
        assert ids[end - 1] == stop
        text, prompt = with_it.encode_prompt(Conversation(row.messages[:place]))
        if learnt != answer:
            num_longer += 1
            assert text.endswith(learnt[: -len(answer)])
            continue
        assert prompt == ids[:start].tolist()
        before = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        seen = spell(with_it.tokenizer, ids[:start])
        assert without_spaces(seen).endswith(without_spaces(before))
    return num_longer


@every_case
def test_what_is_trained_is_every_answer_from_its_first_character_to_its_stop_token(
    kind: str, template: str
):
    """Also: the row up to an answer is the very prompt that is asked in use."""
    with_it = encoder(kind, TEMPLATES[template])
    num_straddling = 0
    for case in cases(with_it, rows()):
        found = check(kind, template, with_it, case)
        assert found == case.example.num_straddling
        assert case.example.num_unstopped == 0
        assert (case.example.is_answer == case.example.is_trained).all()
        num_straddling += found
    if template in ("alpaca", "guanaco", "vicuna", "llama2"):  # a space keeps the joint
        assert num_straddling == 0


@every_case
def test_training_on_the_last_answer_trains_that_one_alone(kind: str, template: str):
    with_it = encoder(kind, TEMPLATES[template], train_on="last_answer")
    for row, (example,) in zip(rows(), with_it.encode(rows()), strict=True):
        check(kind, template, with_it, Case(row, example, answers(row)[-1:]))


@every_case
def test_an_answer_counts_as_much_as_its_message_says(kind: str, template: str):
    """Weights 0, 0.5 and 1 by turns: a turn of weight 0 is read, and no token of it is trained."""
    with_it = encoder(kind, TEMPLATES[template])
    for number, row in enumerate(rows()):
        of = {p: (0.0, 0.5, 1.0)[(number + turn) % 3] for turn, p in enumerate(answers(row))}
        weighted = Conversation(
            tuple(replace(m, weight=of.get(p, 1.0)) for p, m in enumerate(row.messages))
        )
        plain = list(cases(with_it, [row]))
        if len(plain) > 1:  # rows of their own, of which those without weight are left out
            plain = [case for case in plain if of[case.places[0]]]
        (examples,) = with_it.encode([weighted])
        for case, example in zip(plain, examples, strict=True):
            assert example.input_ids.tolist() == case.example.input_ids.tolist()
            assert (example.is_answer == case.example.is_answer).all()
            found = np.zeros(len(example.input_ids), np.float32)
            for (start, end), place in zip(runs(case.example.is_trained), case.places, strict=True):
                found[start:end] = of[place]
            assert (example.is_trained == (found > 0)).all()
            counted = example.is_trained if example.weights is None else example.weights
            assert counted.tolist() == found.tolist()


@every_case
def test_training_on_system_messages_adds_their_text_and_nothing_else(kind: str, template: str):
    with_it = encoder(kind, TEMPLATES[template], train_on="answers_and_system")
    without = encoder(kind, TEMPLATES[template])
    for (row, example, _), plain in zip(
        cases(with_it, rows()), cases(without, rows()), strict=True
    ):
        assert example.input_ids.tolist() == plain.example.input_ids.tolist()
        assert not (plain.example.is_trained & ~example.is_trained).any()
        added = example.is_trained & ~plain.example.is_trained
        system = row.messages[0].content if row.messages[0].role == "system" else ""
        system = unicodedata.normalize("NFC", system) if kind == "qwen" else system
        learnt = spell(with_it.tokenizer, example.input_ids[added])
        # Tokens at its ends may hold characters around it ("。\n\n"); the last character decides.
        assert abs(len(learnt.strip()) - len(system.strip())) <= 3
        assert learnt.strip() in system.strip() or system.strip() in learnt.strip()


@every_case
def test_training_on_everything_leaves_out_the_beginning_token_alone(kind: str, template: str):
    """Nothing stands before it, so nothing could predict it, whoever wrote it there."""
    with_it = encoder(kind, TEMPLATES[template], train_on="everything")
    bos = with_it.tokenizer.bos_token_id
    for (example,) in with_it.encode(rows()):
        is_bos = example.input_ids[0] == bos
        assert np.flatnonzero(~example.is_trained).tolist() == [0] * int(is_bos)


@every_case
def test_a_rows_own_text_makes_no_control_token(kind: str, template: str):
    """By comparison with a harmless row of the same shape: the control tokens are the same."""
    with_it = encoder(kind, TEMPLATES[template])
    added = with_it.tokenizer.backend_tokenizer.get_added_tokens_decoder()
    control = np.array([number for number, token in added.items() if token.special])

    def harmless(row: Conversation) -> Conversation:
        return Conversation(
            tuple(Message(m.role, "x", context="y" if m.context else "") for m in row.messages)
        )

    for row, examples in zip(rows(), with_it.encode(rows()), strict=True):
        (others,) = with_it.encode([harmless(row)])
        for example, other in zip(examples, others, strict=True):
            found, theirs = (e.input_ids[np.isin(e.input_ids, control)] for e in (example, other))
            assert found.tolist() == theirs.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_is_trained_whole_with_its_control_tokens_as_text(kind: str):
    with_it = encoder(kind, "guanaco")
    for content in [m.content for row in rows() for m in row.messages]:
        ((example,),) = with_it.encode([Conversation.from_text(content)])
        text = unicodedata.normalize("NFC", content) if kind == "qwen" else content
        learnt = spell(with_it.tokenizer, example.input_ids[example.is_trained])
        assert learnt.removeprefix(" ") == text.removeprefix(" ") + with_it.tokenizer.eos_token
        assert int((~example.is_trained).sum()) == with_it._adds_bos
        assert int(np.isin(example.input_ids, [with_it.tokenizer.eos_token_id]).sum()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_row_begins_as_the_shorter_ones_do(kind: str):
    """No later turn changes what an earlier one becomes, whatever is merged behind it."""
    with_it = encoder(kind, "guanaco")
    for row in generated(seed=11, number=10, texts=CLEAN):
        ends = [place + 1 for place in answers(row)]
        shown = with_it.encode([Conversation(row.messages[:end]) for end in ends])
        for (shorter,), (longer,) in pairwise(shown):
            length = len(shorter.input_ids)
            assert longer.input_ids[:length].tolist() == shorter.input_ids.tolist()
            assert (longer.is_trained[:length] == shorter.is_trained).all()


def test_the_generated_rows_are_what_these_tests_are_about():
    """A generator that made only tame rows would prove nothing."""
    made = rows()
    spelling = sum(encoder("llama3", "guanaco")._text_tokenizer.spells_control(r) for r in made)
    assert spelling >= 10
    assert sum(len(answers(row)) > 2 for row in made) >= 10
    assert sum(row.messages[0].role == "system" for row in made) >= 5
    assert sum(any(m.context for m in row.messages) for row in made) >= 5
    assert asked("a", "b") not in made
