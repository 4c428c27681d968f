"""The ids of a row are those of its text in one pass, and no control token but the template's."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from generated_rows import CLEAN, KINDS, encoder, generated, tokenizer
from test_masks import CASES, TEMPLATES
from tokenizers import AddedToken
from toy_tokenizers import asked, build, spell

from qlora_pl.data.conversation import Conversation
from qlora_pl.data.encoding.encoder import EncodedExample, Encoder
from qlora_pl.data.encoding.tokenization import PiecedText, TextTokenizer, Tokens, WholeText
from qlora_pl.data.templates.loading import load_template
from qlora_pl.data.templates.template import Rendering, Segment

every_case = pytest.mark.parametrize(("kind", "template"), CASES)


def renderings(with_it: Encoder, rows: list[Conversation]) -> list[Rendering]:
    """With the rows' own text told from the template's."""
    return [r for some in with_it.template.render_rows(rows, marks_content=True) for r in some]


# -- against the tokenizer itself ----------------------------------------------------------------


@every_case
def test_ids_are_what_the_tokenizer_makes_of_the_whole_text(kind: str, template: str):
    """Of rows that spell no control token, by transformers' own call."""
    with_it = encoder(kind, TEMPLATES[template])
    for row in generated(seed=21, number=12, texts=CLEAN):
        ((_, shown),) = with_it.render([row])
        for rendering, example in zip(shown, with_it.encode([row])[0], strict=True):
            theirs = with_it.tokenizer(rendering.text, add_special_tokens=False)["input_ids"]
            ours = example.input_ids.tolist()
            assert ours[len(ours) - len(theirs) :] == theirs
            assert ours[: len(ours) - len(theirs)] in ([], [with_it.tokenizer.bos_token_id])


@pytest.mark.parametrize(
    ("kind", "template"), [case for case in CASES if case[0] not in ("sentencepiece", "mistral3")]
)
def test_ids_of_rows_that_spell_control_tokens_are_those_of_their_stretches(
    kind: str, template: str
):
    """By transformers' ``split_special_tokens``, stretch by stretch between control tokens.

    Not where a space is put before the first stretch alone: that call would put one before each.
    """
    with_it = encoder(kind, TEMPLATES[template])
    control = with_it._text_tokenizer.control_pattern
    for row in generated(seed=22, number=12):
        if not with_it._text_tokenizer.spells_control(row):
            continue
        for shown, example in zip(
            renderings(with_it, [row]), with_it.encode([row])[0], strict=True
        ):
            ours = example.input_ids.tolist()
            theirs = stretched(with_it.tokenizer, shown, control)
            assert ours[len(ours) - len(theirs) :] == theirs


def stretched(by: Any, rendering: Rendering, control: re.Pattern[str]) -> list[int]:
    """Ids of ordinary text as ``split_special_tokens`` has them, between the template's own."""
    ids: list[int] = []
    stretch = ""
    for segment in [*rendering.segments, Segment("")]:
        parts = [segment.text] if segment.is_content else control.split(segment.text)
        between = [] if segment.is_content else control.findall(segment.text)
        stretch += parts[0]
        for token, following in zip(between, parts[1:], strict=True):
            ids += [*plain(by, stretch), by.convert_tokens_to_ids(token)]
            stretch = following
    return ids + plain(by, stretch)


def plain(by: Any, text: str) -> list[int]:
    if not text:
        return []
    return by(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@every_case
def test_one_pass_and_pieces_agree_where_no_control_token_is_spelt(kind: str, template: str):
    """The ids, and for every character of the text the token that it is in."""
    with_it = encoder(kind, TEMPLATES[template])
    shown = renderings(with_it, generated(seed=23, number=6, texts=CLEAN))
    tokenized = with_it._text_tokenizer.encode
    whole = tokenized(shown, [False] * len(shown))
    apart = tokenized(shown, [True] * len(shown))
    for rendering, one, pieces in zip(shown, whole, apart, strict=True):
        assert isinstance(one, WholeText)
        assert isinstance(pieces, PiecedText)
        assert list(one.ids) == list(pieces.ids)
        assert places(one, rendering.text) == places(pieces, rendering.text)


def places(tokens: Tokens, text: str) -> list[tuple[int, bool]]:
    where = [tokens.token_at(character) for character in range(len(text))]
    return [(t, tokens.begins_before(t, c)) for c, t in enumerate(where)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_is_in_the_token_that_spells_it(kind: str):
    """Where every token is a character or more of ASCII: the spelled lengths say which is whose."""
    with_it = encoder(kind, "guanaco")
    row = asked("def f(x):\n    return 1  # </s>", "It is </s> and <s>; x = 10.")
    (shown,) = renderings(with_it, [row])
    for spells in (False, True):
        (tokens,) = with_it._text_tokenizer.encode([shown], [spells])
        texts = [spell(with_it.tokenizer, [token]) for token in tokens.ids]
        own = "".join(texts)
        extra = len(own) - len(shown.text)  # SentencePiece's space at the beginning
        if own[extra:] != shown.text:
            continue  # and behind control tokens, where nothing of the text is
        ends = [sum(map(len, texts[: n + 1])) - extra for n in range(len(texts))]
        for character in range(len(shown.text)):
            expected = next(n for n, end in enumerate(ends) if end > character)
            assert tokens.token_at(character) == expected


# -- control tokens of other kinds ---------------------------------------------------------------

PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def with_tokens(names: str, template: str = PHI3, **how: Any) -> Encoder:
    """An encoder whose tokenizer has these control tokens too."""
    made = copy.deepcopy(build("bytes", template))
    tokens = [AddedToken(n, normalized=False, **how) for n in names.split()]
    made.backend_tokenizer.add_tokens(tokens)
    return Encoder(load_template("chat", made), made)


def learnt(with_it: Encoder, example: EncodedExample) -> list[str]:
    ids = example.input_ids[example.is_trained]
    return with_it.tokenizer.convert_ids_to_tokens(ids.tolist())


@pytest.mark.parametrize("strips", ["rstrip", "lstrip", "both", "neither"])
@pytest.mark.parametrize("question", ["Why?", "Why </s>?"], ids=["clean", "spells a token"])
def test_control_tokens_that_swallow_spaces_are_neither_lost_nor_trained(
    strips: str, question: str
):
    """As Phi-3's and Phi-4's, which take the spaces around them.

    By hand: of two spaces before an answer a token that swallows leaves none, and the newline
    behind the stop token is never trained, whoever swallows it.
    """
    how = {"rstrip": strips in ("rstrip", "both"), "lstrip": strips in ("lstrip", "both")}
    with_it = with_tokens("<|user|> <|assistant|> <|end|>", special=True, **how)
    row = asked(question, "  x y ", "And?", "z")
    ((example,),) = with_it.encode([row])
    spaces = [] if how["rstrip"] else ["Ġ", "Ġ"]
    after = [] if how["lstrip"] else ["Ġ"]
    expected = [*spaces, "x", "Ġ", "y", *after, "<|end|>", "z", "<|end|>"]
    assert learnt(with_it, example) == expected
    assert example.num_unstopped == 0
    for place in (1, 3):
        prompt = with_it.encode_prompt(Conversation(row.messages[:place]))[1]
        assert example.input_ids[: len(prompt)].tolist() == prompt
        assert not example.is_trained[len(prompt) - 1]
        assert example.is_trained[len(prompt)]


def test_a_token_with_a_role_is_a_control_token_whatever_its_entry_says():
    """Some tokenizers add "<|im_end|>" as an ordinary token and name it as the end of text."""
    with_it = with_tokens("<|quit|>", special=False)
    tokenizer_ = with_it.tokenizer
    tokenizer_.eos_token = "<|quit|>"
    again = Encoder(load_template("guanaco", tokenizer_), tokenizer_)
    ((example,),) = again.encode([asked("<|quit|>?", "It says <|quit|> there.")])
    quits = example.input_ids == tokenizer_.convert_tokens_to_ids("<|quit|>")
    assert quits.nonzero()[0].tolist() == [len(example.input_ids) - 1]
    unknown = copy.deepcopy(build("bytes"))
    unknown.backend_tokenizer.add_tokens([AddedToken("<|quit|>", special=False)])
    unknown.bos_token = "<|quit|>"
    assert TextTokenizer(unknown, "</s>").spells_control(asked("<|quit|>", "a"))


def test_ordinary_added_tokens_stay_whole_in_a_row_that_spells_control_tokens():
    """As "<think>" of reasoning models, which answers are to hold."""
    with_it = with_tokens("<think> </think>", special=False)
    think = with_it.tokenizer.convert_tokens_to_ids("<think>")
    for answer in ("<think>so</think> a", "<think>so</think> </s>"):
        ((example,),) = with_it.encode([asked("Why?", answer)])
        assert (example.input_ids == think).sum() == 1


@pytest.mark.parametrize("kind", ["smollm2", "qwen"])
def test_the_tokenizer_that_is_given_is_not_changed(kind: str):
    """Padding, truncation and control tokens are set on copies."""
    before = tokenizer(kind).backend_tokenizer.to_str()
    with_it = encoder(kind, "chat")
    with_it.encode([asked("<|im_end|>", "</s>"), asked("a", "b")])
    assert tokenizer(kind).backend_tokenizer.to_str() == before


def test_a_tokenizer_that_was_told_to_pad_or_cut_does_neither():
    made = copy.deepcopy(build("bytes"))
    made.backend_tokenizer.enable_truncation(5)
    made.backend_tokenizer.enable_padding(length=500)
    for question in ("Why?", "Why </s>?"):
        ((cut,),) = Encoder(load_template("guanaco", made), made).encode(
            [asked(question, "It is.")]
        )
        whole = encoder("bytes", "guanaco").encode([asked(question, "It is.")])[0][0]
        assert cut.input_ids.tolist() == whole.input_ids.tolist()
