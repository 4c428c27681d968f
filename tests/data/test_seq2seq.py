"""Pairs for encoder-decoder models: what goes to which side, what is cut, and how sides are padded.

Expected ids come from transformers' own call of the tokenizer with a text and a target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_t5_tokenizer
from families import Saver

from qlora_pl.batch import FILLER_ROW, IGNORE_INDEX
from qlora_pl.data.batches.pair_batches import collate_pairs
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.encoder_choice import choose_encoder
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.encoding.seq2seq import Seq2SeqEncoder
from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.data.rows.preparation import EncodedSplit, prepare_split
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import ConfigurationError, QLoRAError

LONG = 10_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Transformers' T5 tokenizer, over a vocabulary of a page."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_t5_tokenizer(folder)
    return load_tokenizer(str(folder))


def make_encoder(tokenizer: Any, template: str = "plain", **settings: Any) -> Seq2SeqEncoder:
    return Seq2SeqEncoder(load_template(template, tokenizer), tokenizer, **settings)


def asked(question: str, answer: str, **more: Any) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer, **more)))


def sides(rows: EncodedRows, row: int = 0) -> tuple[list[int], list[int]]:
    """A pair's source and target."""
    ids, labels = rows[row]
    num_source = int((labels == IGNORE_INDEX).sum())
    return ids[:num_source].tolist(), labels[num_source:].tolist()


def of(encoder: Encoder, conversation: Conversation) -> list[tuple[list[int], list[int]]]:
    (examples,) = encoder.encode([conversation])
    return [sides(EncodedRows.from_examples([example])) for example in examples]


def audit(tokenizer: Any, rows: Any, template: str = "plain", **limits: Any) -> EncodedSplit:
    settings = Limits(**{"max_length": LONG, "max_lost_ratio": 1.0} | limits)
    sources = RowSources.parse(rows)
    return prepare_split(sources, make_encoder(tokenizer, template), settings, "data.x")


# --- what goes to which side ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How many legs has a spider?", "It has eight legs."),
        ("What  is\nthe capital", " of France? "),
        ("Paris 2", "7"),
    ],
)
def test_both_sides_are_what_transformers_makes_of_a_text_and_a_target(tokenizer, question, answer):
    """Source: the tokenizer's own call; both end in ``</s>`` (1), and nothing begins them."""
    encoder = make_encoder(tokenizer)
    expected = tokenizer(question, text_target=answer)
    assert of(encoder, asked(question, answer)) == [(expected["input_ids"], expected["labels"])]
    assert expected["input_ids"][-1] == expected["labels"][-1] == 1
    assert encoder.stop_ids == {1}


def test_a_template_asks_and_an_answer_is_its_words_alone(tokenizer):
    """Alpaca's answers follow a space and end in EOS as text; here neither is written."""
    encoder = make_encoder(tokenizer, "alpaca")
    ((source, target),) = of(encoder, asked("Name the capital", "Paris"))
    prompt = load_template("alpaca", tokenizer).render_prompt(
        Conversation((Message("user", "Name the capital"),))
    )
    assert source == tokenizer(prompt.text)["input_ids"]
    assert target == tokenizer("Paris")["input_ids"]


def test_a_prompt_is_asked_as_it_was_trained(tokenizer):
    encoder = make_encoder(tokenizer, "alpaca")
    conversation = asked("Name the capital", "Paris", weight=1.0)
    text, ids = encoder.encode_prompt(conversation.prompt)
    assert ids == of(encoder, conversation)[0][0]
    assert text.endswith("### Response:")


def test_each_trained_answer_is_a_pair_with_all_that_was_said_before(tokenizer):
    turns = (
        Message("user", "legs"),
        Message("assistant", "eight"),
        Message("user", "capital"),
        Message("assistant", "Rome", weight=0.0),
        Message("user", "really"),
        Message("assistant", "Paris"),
    )
    template = load_template("guanaco", tokenizer)
    pairs = of(make_encoder(tokenizer, "guanaco"), Conversation(turns))
    expected = [
        (template.render_prompt(Conversation(turns[:place])).text, turns[place].content)
        for place in (1, 5)
    ]
    assert pairs == [(tokenizer(s)["input_ids"], tokenizer(t)["input_ids"]) for s, t in expected]
    last = make_encoder(tokenizer, "guanaco", train_on="last_answer")
    assert of(last, Conversation(turns)) == pairs[1:]


def test_an_answers_weight_is_that_of_its_tokens(tokenizer):
    rows = [asked("legs", "eight", weight=0.5), asked("legs", "eight")]
    examples = [its[0] for its in make_encoder(tokenizer).encode(rows)]
    batch = collate_pairs(EncodedRows.from_examples(examples), np.arange(2), 0)
    num_target = int(batch["decoder_attention_mask"][0].sum())
    weights = batch["loss_weights"]
    assert weights.shape == batch["labels"].shape
    assert weights[0, :num_target].tolist() == [0.5] * num_target
    assert weights[1, :num_target].tolist() == [1.0] * num_target


def test_text_that_spells_the_end_token_does_not_end_a_side(tokenizer):
    ((source, target),) = of(make_encoder(tokenizer), asked("is </s> it", "a </s> b"))
    assert (source.count(1), target.count(1)) == (1, 1)
    assert source[-1] == target[-1] == 1


def test_a_tokenizer_that_frames_its_texts_frames_both_sides(tmp_path):
    """BART's begins a text with BOS and ends it with EOS."""
    from tokenizers.processors import TemplateProcessing

    save_t5_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<extra_id_0> $A </s>",
        special_tokens=[
            ("<extra_id_0>", tokenizer.convert_tokens_to_ids("<extra_id_0>")),
            ("</s>", 1),
        ],
    )
    expected = (tokenizer("legs")["input_ids"], tokenizer("eight")["input_ids"])
    assert of(make_encoder(tokenizer), asked("legs", "eight")) == [expected]
    assert expected[0][0] == tokenizer.convert_tokens_to_ids("<extra_id_0>")


def test_a_tokenizer_that_has_lost_its_end_still_ends_both_sides(tmp_path):
    save_t5_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer("legs")["input_ids"][-1] != 1
    ((source, target),) = of(make_encoder(tokenizer), asked("legs", "eight"))
    assert source[-1] == target[-1] == 1


# --- lengths --------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "What is the capital of France?", "response": "Paris"},
    {"prompt": "legs?", "response": "It has eight legs, and many more."},
]


def test_each_side_is_cut_to_its_own_limit(tokenizer):
    """A source keeps its end token, a target does not: it would teach to stop in mid-sentence."""
    whole = audit(tokenizer, ROWS)
    cut = audit(tokenizer, ROWS, max_length=6, max_target_length=4)
    for row in range(2):
        source, target = sides(whole.rows, row)
        expected = source if len(source) <= 6 else [*source[:5], 1]
        assert sides(cut.rows, row) == (expected, target[:4])
    lost = sum(max(0, len(sides(whole.rows, row)[1]) - 4) for row in range(2))
    assert cut.report.num_lost_tokens == lost > 0
    assert cut.report.num_cut == 2


def test_both_lengths_are_in_the_report(tokenizer):
    split = audit(tokenizer, ROWS, max_length=6, max_target_length=4)
    lengths = [
        (len(tokenizer(row["prompt"])["input_ids"]), len(tokenizer(row["response"])["input_ids"]))
        for row in ROWS
    ]
    longest, longest_target = (max(side) for side in zip(*lengths, strict=True))
    assert (split.report.longest, split.report.longest_target) == (longest, longest_target)
    assert f"longest source {longest}, longest target {longest_target}" in str(split.report)
    part = split.select([0]).report  # of what is left
    assert (part.longest, part.longest_target) == (6, min(4, lengths[0][1]))


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"max_length": 6, "max_target_length": 99}, [1]),
        ({"max_length": 99, "max_target_length": 7}, [0]),
        ({"max_length": 99, "max_target_length": 99}, [0, 1]),
    ],
)
def test_a_pair_is_dropped_if_either_side_is_too_long(tokenizer, limits, kept):
    split = audit(tokenizer, ROWS, overlong="drop", **limits)
    expected = [tuple(tokenizer(ROWS[row][k])["input_ids"] for k in ROWS[row]) for row in kept]
    assert [sides(split.rows, row) for row in range(len(split.rows))] == expected


def test_the_budgets_sentence_names_the_limit_that_would_do(tokenizer):
    limits = {"max_length": 50, "max_target_length": 3, "max_lost_ratio": 0.1}
    with pytest.raises(ConfigurationError, match="max_target_length 3 takes away") as caught:
        audit(tokenizer, ROWS, **limits)
    words = str(caught.value).split("data.max_target_length ")
    enough = int(words[2].split()[0])
    audit(tokenizer, ROWS, **limits | {"max_target_length": enough})
    with pytest.raises(ConfigurationError):
        audit(tokenizer, ROWS, **limits | {"max_target_length": enough - 1})


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_takes_pairs_apart_and_pads_each_side_to_a_multiple_of_eight(tokenizer):
    rows = audit(tokenizer, ROWS).rows
    batch = collate_pairs(rows, np.array([1, 0]), pad_id=7)
    assert batch["row_ids"].tolist() == [1, 0]
    for side, mask, filler in (
        ("input_ids", "attention_mask", 7),
        ("labels", "decoder_attention_mask", IGNORE_INDEX),
    ):
        tensor, lengths = batch[side], batch[mask].sum(dim=1)  # type: ignore[literal-required]
        assert tensor.dtype == torch.int64
        expected = [sides(rows, row)[side == "labels"] for row in (1, 0)]
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert tensor.shape[1] % 8 == 0
        assert tensor.shape[1] - int(lengths.max()) < 8
        for line, ids in zip(tensor.tolist(), expected, strict=True):
            assert line == ids + [filler] * (len(line) - len(ids))
    assert "loss_weights" not in batch


def test_no_pairs_at_all_are_a_line_without_labels(tokenizer):
    batch = collate_pairs(audit(tokenizer, ROWS).rows, np.array([], dtype=int), pad_id=0)
    assert batch["row_ids"].tolist() == [FILLER_ROW]
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert batch["attention_mask"].sum() == batch["decoder_attention_mask"].sum() == 1


# --- choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "is_paired"), [("T5", True), ("LLaMA", False)])
def test_the_models_configuration_decides(saved: Saver, rows_file: Path, family, is_paired):
    data = InstructionDataModule(
        str(rows_file), tokenizer=str(saved(family)), template="guanaco", val_size=2, cache=False
    )
    data.setup("fit")
    assert data.encoder.is_paired is is_paired
    (batch, *_) = data.first_batches(1)
    assert ("decoder_attention_mask" in batch) is is_paired
    (scored, *_) = data.val_dataloader()
    assert ("decoder_attention_mask" in scored) is is_paired


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"train_on": "everything"}, "data.train_on: everything has no meaning"),
        ({"overlong": "split"}, "data.overlong: split is not for pairs"),
        ({"overlong": "cut_keep_stop"}, "choose cut, drop or error"),
        ({"encoding": "original"}, "data.encoding: original is for causal models"),
    ],
)
def test_what_has_no_meaning_for_pairs_is_one_sentence(tokenizer, settings, sentence):
    defaults = {"encoding": "spans", "train_on": "answers", "overlong": "cut"}
    with pytest.raises(ConfigurationError) as caught:
        choose_encoder(
            template=load_template("plain", tokenizer),
            tokenizer=tokenizer,
            append_eos=True,
            max_target_length=None,
            has_encoder=True,
            **defaults | settings,
        )
    assert sentence in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "setting", [{"packing": True}, {"tokens_per_batch": 1024}, {"padding": "max_length"}]
)
def test_shapes_of_batches_that_pairs_cannot_have_are_refused(saved: Saver, rows_file, setting):
    data = InstructionDataModule(
        str(rows_file), tokenizer=str(saved("T5")), template="plain", val_size=2, **setting
    )
    with pytest.raises(ConfigurationError, match=next(iter(setting))) as caught:
        data.setup("fit")
    assert len(caught.value.problems) == 1


def test_plain_text_is_refused_with_its_place(tokenizer, write_rows):
    path = write_rows([{"text": "a text"}])
    with pytest.raises(QLoRAError) as caught:
        audit(tokenizer, str(path))
    assert "rows.jsonl, row 1: plain text has no question for an encoder" in str(caught.value)


def test_a_last_answer_that_weighs_nothing_is_an_untrained_row(tokenizer):
    """Which is then counted as such, where none at all would be lost without a word."""
    turns = (
        Message("user", "legs"),
        Message("assistant", "eight"),
        Message("user", "capital"),
        Message("assistant", "Rome", weight=0.0),
    )
    encoder = make_encoder(tokenizer, train_on="last_answer")
    ((example,),) = encoder.encode([Conversation(turns)])
    assert (example.num_trained, int(example.is_answer.sum())) == (
        0,
        len(tokenizer("Rome").input_ids),
    )


# --- looking at pairs -----------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["answers", "last_answer"])
def test_a_traced_pair_is_the_encoded_pair_and_its_tokens_cover_its_text(
    train_on: Any, tokenizer: Any
) -> None:
    """Words are spelled out of the text by their tokens' characters; frames cover nothing."""
    encoder = make_encoder(tokenizer, "alpaca", train_on=train_on)
    turns = ("How many legs?", "Eight legs.", "It says </s> here?", "It has eight legs. 日本")
    row = Conversation(
        tuple(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(turns))
    )
    (examples,) = encoder.encode([row])
    traced = encoder.trace(row)
    assert len(traced) == len(examples) == (2 if train_on == "answers" else 1)
    for found, example in zip(traced, examples, strict=True):
        assert found.example.input_ids.tolist() == example.input_ids.tolist()
        assert len(found.spans) == len(example.input_ids)
        assert all(a <= b for a, b in found.spans)
        assert found.text.endswith(("Eight legs.", "日本"))
        for token, (start, end) in zip(example.input_ids, found.spans, strict=True):
            name = tokenizer.convert_ids_to_tokens(int(token))
            if name == tokenizer.eos_token:
                assert found.text[start:end] in ("", "</s>")
            elif (word := name.strip("▁")).isascii() and word.isalpha():
                assert found.text[start:end].strip() == word
