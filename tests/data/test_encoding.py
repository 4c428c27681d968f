"""Which tokens are trained, checked by reading the ids back with ``toy_tokenizers.spell``."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from toy_tokenizers import KINDS, TEXTS, asked, build, spell
from transformers import PreTrainedTokenizerFast

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.example import EncodedExample
from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.data.templates.loading import load_template
from qlora_pl.data.templates.wording import TEXT_TEMPLATES
from qlora_pl.errors import ConfigurationError

NAMES = [name for name in (*TEXT_TEMPLATES, "chat") if name != "llama3"]  # has tokens of its own


def encoder(kind: str, name: str, **settings: Any) -> Encoder:
    tokenizer = build(kind)
    return Encoder(load_template(name, tokenizer), tokenizer, **settings)


def encode(encode_with: Encoder, conversation: Conversation) -> EncodedExample:
    ((example,),) = encode_with.encode([conversation])
    return example


def encode_all(encode_with: Encoder, rows: list[Conversation]) -> list[EncodedExample]:
    return [example for (example,) in encode_with.encode(rows)]


def learnt(encode_with: Encoder, example: EncodedExample) -> str:
    return spell(encode_with.tokenizer, example.input_ids[example.is_trained])


def expected(name: str, answers: list[str]) -> str:
    """What a template adds to an answer, written out by hand."""
    before, stop = {
        "alpaca": (" ", "</s>"),
        "guanaco": (" ", "</s>"),
        "instruction-response": ("", "</s>"),
        "plain": (" ", "</s>"),
        "vicuna": (" ", "</s>"),
        "chatml": ("", "<|im_end|>"),
        "llama2": (" ", " </s>"),
        "chat": ("", "<|im_end|>"),
    }[name]
    return "".join(before + answer + stop for answer in answers)


def conversations(seed: int, number: int) -> list[Conversation]:
    """Of one to three turns, some with a system message or a context, of all kinds of text."""
    chosen = random.Random(seed)
    made = []
    for _ in range(number):
        contents = chosen.choices(TEXTS, k=2 * chosen.randint(1, 3))
        conversation = asked(*contents, system=chosen.choice([None, None, "Be brief."]))
        first = conversation.messages[0]
        if first.role == "user" and chosen.random() < 0.3:
            with_context = Message("user", first.content, context=chosen.choice(TEXTS))
            conversation = Conversation((with_context, *conversation.messages[1:]))
        made.append(conversation)
    return made


def answers_of(conversation: Conversation) -> list[str]:
    return [m.content for m in conversation.messages if m.role == "assistant"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_trained_tokens_spell_exactly_the_answers_and_their_stop_tokens(kind: str, name: str):
    with_it = encoder(kind, name)
    rows = [asked(question, answer) for question in TEXTS[:3] for answer in TEXTS]
    rows += [asked(question, TEXTS[0]) for question in TEXTS]
    rows += conversations(seed=1, number=60)
    for conversation, example in zip(rows, encode_all(with_it, rows), strict=True):
        assert learnt(with_it, example) == expected(name, answers_of(conversation))
        assert example.num_straddling == 0
        assert example.num_unstopped == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_the_beginning_of_its_row_up_to_the_first_trained_token(kind: str, name: str):
    """Exceptions would be rows with a token over the joint; these tokenizers have none."""
    with_it = encoder(kind, name)
    rows = [asked(question, answer) for question in TEXTS for answer in TEXTS]
    exceptions = 0
    for conversation, example in zip(rows, encode_all(with_it, rows), strict=True):
        _, prompt = with_it.encode_prompt(conversation.prompt)
        first = int(np.flatnonzero(example.is_trained)[0])
        exceptions += prompt != example.input_ids[:first].tolist()
    assert exceptions == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_of_a_dialogue_ends_where_its_last_answer_begins(kind: str, name: str):
    with_it = encoder(kind, name)
    rows = conversations(seed=2, number=60)
    for conversation, example in zip(rows, encode_all(with_it, rows), strict=True):
        _, prompt = with_it.encode_prompt(conversation.prompt)
        assert prompt == example.input_ids[: len(prompt)].tolist()
        last = spell(with_it.tokenizer, example.input_ids[len(prompt) :])
        assert last.removesuffix("\n") == expected(name, [conversation.reference])


def merging_newlines(tmp_path: Path) -> Any:
    """A byte-level tokenizer in which two newlines are one token, as in most published ones."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    vocabulary["ĊĊ"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    return load_tokenizer(str(tmp_path))


def test_a_token_over_the_joint_is_trained_and_counted(tmp_path: Path):
    """By hand: the cue ends in a newline, the answer begins with one, and the two are one token.

    So no prompt can be the beginning of this row, which is what the count is for.
    """
    tokenizer = merging_newlines(tmp_path)
    with_it = Encoder(load_template("instruction-response", tokenizer), tokenizer)
    row = asked("Why?", "\nBecause.")
    example = encode(with_it, row)
    assert example.num_straddling == 1
    assert spell(tokenizer, example.input_ids[example.is_trained]) == "\n\nBecause.</s>"
    prompt = with_it.encode_prompt(row.prompt)[1]
    assert prompt != example.input_ids[: len(prompt)].tolist()
    assert encode(with_it, asked("Why?", "Because.")).num_straddling == 0


def test_templates_with_a_space_before_the_answer_have_no_token_over_the_joint(tmp_path: Path):
    tokenizer = merging_newlines(tmp_path)
    for name in ("alpaca", "guanaco"):
        with_it = Encoder(load_template(name, tokenizer), tokenizer)
        assert encode(with_it, asked("Why?", "\nBecause.")).num_straddling == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_ids_where_trained_and_ignored_elsewhere(kind: str, name: str):
    with_it = encoder(kind, name)
    rows = conversations(seed=3, number=20)
    examples = encode_all(with_it, rows)
    stored = EncodedRows.from_examples(examples)
    for place, example in enumerate(examples):
        ids, labels = stored[place]
        for has_label in (labels, example.labels):
            assert has_label.dtype == np.int64
            assert (has_label[example.is_trained] == example.input_ids[example.is_trained]).all()
            assert (has_label[~example.is_trained] == IGNORE_INDEX).all()
        assert ids.tolist() == example.input_ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_of_a_dialogue_trains_its_stop_token(kind: str):
    row = asked("One?", "1.", "Two?", "2.", "Three?", "3.")
    for name in NAMES:
        with_it = encoder(kind, name)
        example = encode(with_it, row)
        trained = Counter(example.input_ids[example.is_trained].tolist())
        assert sum(trained[stop] for stop in with_it.stop_ids) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_prompts_trains_every_token_but_bos(kind: str, name: str):
    with_it = encoder(kind, name, train_on="everything")
    for row in conversations(seed=4, number=20):
        example = encode(with_it, row)
        # LLaMA-2's template writes BOS itself, before every question; only the first is no label.
        has_bos = kind in ("bytes-bos", "sentencepiece") or name == "llama2"
        assert int((~example.is_trained).sum()) == has_bos
        assert example.input_ids[0] == 1 or not has_bos


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_is_trained_whole_and_then_stops(kind: str):
    with_it = encoder(kind, "guanaco")
    for text in TEXTS:
        example = encode(with_it, Conversation.from_text(text))
        dummy = " " if kind == "sentencepiece" and not text.startswith(" ") else ""
        assert learnt(with_it, example) == dummy + text + "</s>"
        assert example.num_unstopped == 0


def test_bos_comes_first_and_once():
    chat_with_bos = "{{ '<s>' }}" + CHAT_TEMPLATE
    for kind, template, number in (
        ("bytes", CHAT_TEMPLATE, 0),
        ("bytes-bos", CHAT_TEMPLATE, 1),
        ("sentencepiece", CHAT_TEMPLATE, 1),
        ("bytes-bos", chat_with_bos, 1),
        ("bytes", chat_with_bos, 1),
    ):
        tokenizer = build(kind, template)
        with_it = Encoder(load_template("chat", tokenizer), tokenizer)
        ids = encode(with_it, asked("Why?", "Because.")).input_ids.tolist()
        prompt = with_it.encode_prompt(asked("Why?"))[1]
        assert ids.count(1) == number
        assert ids[:number] == [1] * number
        assert prompt == ids[: len(prompt)]


def test_tokens_that_cover_only_spaces_are_trained_where_offsets_are_trimmed():
    """GPT-NeoX's and RoBERTa's tokenizers say that a token of spaces covers no character at all.

    By hand: an answer of code, whose indentation is tokens of their own.
    """
    with_it = encoder("bytes-trimmed", "guanaco")
    example = encode(with_it, asked("Code?", "if x:\n        return 1"))
    spaces = with_it.tokenizer.convert_tokens_to_ids("Ġ")
    where = example.input_ids == spaces
    assert where[example.is_trained].sum() >= 8
    assert learnt(with_it, example) == " if x:\n        return 1</s>"


def test_the_space_put_before_a_question_by_sentencepiece_is_not_trained():
    """LLaMA 1's tokenizer begins every stretch between control tokens with a space of its own."""
    tokenizer = build.__wrapped__("sentencepiece")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="always", split=False
    )
    with_it = Encoder(load_template("chat", tokenizer), tokenizer)
    example = encode(with_it, asked("日本", "本", "語", "は"))
    assert learnt(with_it, example) == "本<|im_end|>は<|im_end|>"


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_a_tokenizer_that_normalises_trains_the_normalised_answer(form: str):
    """As Qwen's; its tokens cover other characters than were written. By ``unicodedata``."""
    tokenizer = build.__wrapped__("bytes")
    tokenizer.backend_tokenizer.normalizer = getattr(normalizers, form)()
    for name in NAMES:
        with_it = Encoder(load_template(name, tokenizer), tokenizer)
        for text in TEXTS:
            example = encode(with_it, asked(f"e\u0301 {text}", text))
            answer = expected(name, [unicodedata.normalize(form, text)])
            assert learnt(with_it, example) == answer


# -- stop tokens -------------------------------------------------------------------------------


def test_stop_tokens_are_end_of_text_and_what_ends_a_turn():
    tokenizer = build("bytes")
    for name in NAMES:
        if name not in ("chat", "chatml"):
            assert encoder("bytes", name).stop_ids == {2}
    assert encoder("bytes", "chat").stop_ids == {2, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_an_ordinary_word_at_the_end_of_a_turn_is_no_stop_token():
    tokenizer = build("bytes", "{% for m in messages %}{{ m['content'] }}.{% endfor %}")
    with_it = Encoder(load_template("chat", tokenizer), tokenizer)
    assert with_it.stop_ids == {2}
    assert encode(with_it, asked("Why?", "Because")).num_unstopped == 1


# -- the tokenizer itself ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_padding_reuses_a_token_and_the_vocabulary_does_not_grow(kind: str):
    tokenizer = build(kind)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id < len(tokenizer.get_vocab())
    assert "[PAD]" not in tokenizer.get_vocab()


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"data\.tokenizer: no tokenizer .* from '.*here'"):
        load_tokenizer(str(tmp_path / "here"))


# -- storage -----------------------------------------------------------------------------------


def test_stored_rows_are_the_examples_in_any_selection():
    with_it = encoder("bytes", "alpaca")
    examples = encode_all(with_it, conversations(seed=5, number=12))
    stored = EncodedRows.from_examples(examples)
    assert len(stored) == 12
    assert stored.lengths.tolist() == [len(e.input_ids) for e in examples]
    assert stored.num_trained.tolist() == [int(e.is_trained.sum()) for e in examples]
    for chosen in ([3, 1, 1, 11], [], [0], list(range(11, -1, -1))):
        part = stored.select(chosen)
        assert [part[i][0].tolist() for i in range(len(part))] == [
            examples[row].input_ids.tolist() for row in chosen
        ]
        assert [part[i][1].tolist() for i in range(len(part))] == [
            examples[row].labels.tolist() for row in chosen
        ]


def test_fingerprint_changes_with_an_id_a_label_a_weight_a_boundary_or_the_order():
    def rows(ids: list[int], trained: list[int], lengths: list[int], **more: Any) -> EncodedRows:
        sizes = np.array(lengths)
        is_trained = np.array(trained, bool)
        starts = np.cumsum(sizes) - sizes
        num_trained = np.add.reduceat(is_trained, starts)
        return EncodedRows(np.array(ids, np.int32), is_trained, starts, sizes, num_trained, **more)

    base = rows([5, 6, 7], [0, 1, 1], [2, 1])
    others = [
        rows([5, 6, 8], [0, 1, 1], [2, 1]),
        rows([5, 6, 7], [1, 1, 1], [2, 1]),
        rows([5, 6, 7], [0, 1, 1], [1, 2]),
        rows([5, 6, 7], [0, 1, 1], [2, 1], token_weights=np.array([0, 1, 0.5], np.float32)),
        base.select([1, 0]),
    ]
    prints = {rows.fingerprint() for rows in (base, *others)}
    assert len(prints) == 6
    assert base.select([0, 1]).fingerprint() == base.fingerprint()
    assert base.select([1]).fingerprint() == rows([7], [1], [1]).fingerprint()


# -- looking at rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpaca", "guanaco", "llama2", "chat"])  # llama2 writes BOS
@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_row_is_the_encoded_row_and_its_tokens_cover_its_text(
    kind: str, name: str
) -> None:
    """Each token's characters, read off the text, are those that its id stands for."""
    encode_with = encoder(kind, name)
    for text in TEXTS:
        row = asked("Who?", text, text, "Nobody.")
        ((example,),) = encode_with.encode([row])
        (traced,) = encode_with.trace(row)
        assert np.array_equal(traced.example.input_ids, example.input_ids)
        assert np.array_equal(traced.example.is_trained, example.is_trained)
        assert len(traced.spans) == len(example.input_ids)
        num_before = example.num_bos if not traced.text.startswith("<s>") else 0
        assert traced.spans[:num_before] == [(0, 0)] * num_before
        done = 0
        for token, (start, end) in zip(example.input_ids, traced.spans, strict=True):
            assert start <= done or kind == "sentencepiece"
            if start >= done and end > start:  # not a further part of a character
                said = encode_with.tokenizer.convert_ids_to_tokens(int(token))
                if said.isascii() and said.isalnum():
                    assert traced.text[start:end] == said
            done = max(done, end)
        assert done == len(traced.text)


def test_answers_that_become_rows_are_traced_as_rows() -> None:
    """``train_on`` leaves out the same rows here as there."""
    row = Conversation(
        (
            Message("user", "One?"),
            Message("assistant", "1", weight=0.0),
            Message("user", "Two?"),
            Message("assistant", "2"),
        )
    )
    for train_on in ("answers", "last_answer", "answers_and_system", "everything"):
        encode_with = encoder("bytes", "alpaca", train_on=train_on)
        (examples,) = encode_with.encode([row])
        traced = encode_with.trace(row)
        assert [t.example.labels.tolist() for t in traced] == [e.labels.tolist() for e in examples]


def test_a_tokenizer_that_transformers_would_read_through_another_library_is_read_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As Mistral's where mistral-common is installed, with or without what that needs."""
    from transformers import AutoTokenizer

    build("bytes").save_pretrained(tmp_path)
    without_characters = type("Other", (), {"is_fast": False})
    for other in (lambda *_, **__: without_characters(), lambda *_, **__: 1 / 0):
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", other)
        tokenizer = load_tokenizer(str(tmp_path))
        assert (
            tokenizer("It has", add_special_tokens=False)["input_ids"]
            == (build("bytes")("It has", add_special_tokens=False)["input_ids"])
        )
