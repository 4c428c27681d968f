"""``encoding: original`` against a second account of what qlora.py's collator does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_tokenizers import TEXTS, asked, build

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import TrainOn
from qlora_pl.data.encoding.encoder_choice import choose_encoder
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.encoding.original_encoding import OriginalEncoder
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.preparation import prepare_split
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import ConfigurationError

KINDS = ["bytes", "bytes-bos", "sentencepiece"]
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def original(kind: str, template: str, train_on: TrainOn = "answers") -> OriginalEncoder:
    tokenizer = build(kind)
    encoder = choose_encoder(
        "original", load_template(template, tokenizer), tokenizer, train_on, True, 256
    )
    assert isinstance(encoder, OriginalEncoder)
    return encoder


def collated(
    tokenizer: Any, source: str, target: str, limits: tuple[int, int], train_on_source: bool
) -> tuple[list[int], list[int]]:
    """Ids and labels, written from the description of ``DataCollatorForCausalLM``."""

    def cut(text: str, limit: int) -> list[int]:
        ids: list[int] = tokenizer(
            text, max_length=limit, truncation=True, add_special_tokens=False
        )["input_ids"]
        return ids

    sources = cut(f"{tokenizer.bos_token}{source}", limits[0])
    targets = cut(f"{target}{tokenizer.eos_token}", limits[1])
    masked = sources if train_on_source else [IGNORE_INDEX] * len(sources)
    return sources + targets, masked + targets


def fitted(
    encoder: OriginalEncoder, row: Conversation, limits: tuple[int, int]
) -> tuple[list[int], list[int]]:
    ((example,),) = encoder.encode([row])
    (kept,) = encoder.fit(example, Limits(max_length=limits[0], max_target_length=limits[1]))
    return kept.input_ids.tolist(), kept.labels.tolist()


@pytest.mark.parametrize("train_on", ["answers", "everything"])
@pytest.mark.parametrize("limits", [(16, 512), (6, 5), (1000, 3), (3, 1000), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_original_collator(
    kind: str, limits: tuple[int, int], train_on: TrainOn
):
    """Its three shapes: a whole dialogue as target, Alpaca's prompt, columns as they are."""
    tokenizer = build(kind)
    whole = train_on == "everything"
    for text in TEXTS:
        dialogue = f"### Human: {text}### Assistant: Yes. {text}"
        row = Conversation.from_text(dialogue)
        found = fitted(original(kind, "guanaco", train_on), row, limits)
        assert found == collated(tokenizer, "", dialogue, limits, whole)
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\nSum up.\n\n### Input:\n{text}\n\n### Response: "
        )
        row = Conversation((Message("user", "Sum up.", context=text), Message("assistant", text)))
        found = fitted(original(kind, "alpaca", train_on), row, limits)
        assert found == collated(tokenizer, prompt, text, limits, whole)
        found = fitted(original(kind, "plain", train_on), asked("Why? " + text, text), limits)
        assert found == collated(tokenizer, "Why? " + text, text, limits, whole)


def test_an_answer_that_is_cut_loses_its_end_token_and_a_long_question_its_end():
    """The two habits that the default encoding does not have; by hand, one token a digit."""
    encoder = original("bytes", "plain")
    ids, labels = fitted(encoder, asked("0123456789", "777777"), (4, 3))
    digits = encoder.tokenizer.convert_tokens_to_ids
    assert ids == [1, *digits(list("012")), *digits(list("777"))]
    assert labels == [IGNORE_INDEX] * 4 + digits(list("777"))


def test_the_budget_names_the_limit_of_answers():
    rows = [{"prompt": "q", "response": "7" * length} for length in (5, 10, 40)]
    encoder = original("bytes", "alpaca")
    limits = Limits(max_length=500, max_target_length=10, max_lost_ratio=0.02)
    with pytest.raises(ConfigurationError) as caught:
        prepare_split(RowSources.parse(rows), encoder, limits, "data.x")
    # 6 + 11 + 41 trained tokens, of which 2 % is one: all but the EOS of the longest
    assert "data.max_target_length 40 would keep within it" in str(caught.value)
    enough = Limits(max_length=500, max_target_length=40, max_lost_ratio=0.02)
    assert prepare_split(RowSources.parse(rows), encoder, enough, "x").report.num_lost_tokens == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("original", "alpaca", "answers", None), "data.max_target_length: encoding 'original'"),
        (("spans", "alpaca", "answers", 9), "data.max_target_length: a question and its answer"),
        (("original", "chat", "answers", 9), "data.encoding: original knows no chat templates"),
        (("original", "alpaca", "last_answer", 9), "original trains answers or everything, not"),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(settings: Any, sentence: str):
    encoding, template, train_on, limit = settings
    tokenizer = build("bytes")
    with pytest.raises(ConfigurationError, match=sentence):
        choose_encoder(
            encoding, load_template(template, tokenizer), tokenizer, train_on, True, limit
        )


@pytest.mark.parametrize(
    ("name", "limits"),
    [("guanaco7b", (16, 512)), ("guanaco65b", (16, 512)), ("pythia12b_alpaca", (384, 128))],
)
def test_experiments_that_reproduce_the_paper_use_it(name: str, limits: tuple[int, int]):
    """The limits of the original's scripts."""
    data = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())["data"]
    assert data["encoding"] == "original"
    assert (data["max_length"], data["max_target_length"]) == limits


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_row_is_the_encoded_row(kind: str) -> None:
    encoder = original(kind, "alpaca")
    for text in TEXTS:
        row = asked(text, text)
        ((example,),) = encoder.encode([row])
        (traced,) = encoder.trace(row)
        assert traced.example.input_ids.tolist() == example.input_ids.tolist()
        assert traced.example.labels.tolist() == example.labels.tolist()
        assert len(traced.spans) == len(example.input_ids)
        assert max(end for _, end in traced.spans) == len(traced.text)
