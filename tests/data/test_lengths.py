"""Rows that are too long: every policy at every length, against counting by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from generated_rows import encoder, generated
from toy_tokenizers import asked, build

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.encoding.encoder import EncodedExample, Encoder, TrainOn
from qlora_pl.data.encoding.lengths import Overlong, fit_to_length, needed_lengths
from qlora_pl.data.reading.readers import Place
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.audit import DataReport, Limits, check_split, sufficient_length
from qlora_pl.data.rows.chunks import ChunkEncoder, ChunkResult
from qlora_pl.data.rows.preparation import prepare_split
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import ConfigurationError

POLICIES = [policy for policy in get_args(Overlong) if policy != "error"]
TRAIN_ON = list(get_args(TrainOn))
ROWS = [
    asked("Why is that so?", "Because."),
    asked("Why?", "For many reasons, of which this is one.", "And?", "That is all."),
    asked("a", "b", "a long second question", "c", system="Be brief and kind."),
    Conversation(
        (Message("user", "a"), Message("assistant", "b", weight=0.0), *asked("c", "d").messages)
    ),
    Conversation.from_text("Some text that goes on for a while."),
]
CASES = [(kind, template) for kind in ("bytes-bos", "bytes") for template in ("guanaco", "llama2")]


def encoded(kind: str, template: str, train_on: TrainOn = "answers") -> list[EncodedExample]:
    with_it = encoder(kind, template, train_on=train_on)
    rows = ROWS + generated(seed=41, number=4)
    return [example for (example,) in with_it.encode(rows) if len(example.input_ids) < 200]


def lengths_of(example: EncodedExample) -> range:
    return range(2, len(example.input_ids) + 3)


def fitted(example: EncodedExample, max_length: int, policy: Any) -> list[EncodedExample]:
    return fit_to_length(example, max_length, policy, {2})


@pytest.mark.parametrize(("kind", "template"), CASES)
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_longer_than_allowed_and_what_fits_is_left_alone(
    kind: str, template: str, policy: Overlong
):
    for example in encoded(kind, template):
        for max_length in lengths_of(example):
            rows = fitted(example, max_length, policy)
            assert all(len(row.input_ids) <= max_length for row in rows)
            if max_length >= len(example.input_ids):
                assert rows == [example]
            for row in rows:
                sizes = {len(row.input_ids), len(row.is_trained), len(row.is_answer)}
                assert len(sizes) == 1


def subsequence(part: np.ndarray, whole: np.ndarray) -> bool:
    rest = iter(whole.tolist())
    return all(token in rest for token in part.tolist())


@pytest.mark.parametrize(("kind", "template"), CASES)
def test_each_policy_keeps_what_it_says(kind: str, template: str):
    """By slicing: the left end, the left end with a stop token, BOS and the right end, or all."""
    for example in encoded(kind, template):
        ids, trained = example.input_ids, example.is_trained
        bos = ids[: int(ids[0] == 1)]
        first = int(np.flatnonzero(trained)[0])
        for n in range(2, len(ids)):
            (cut,) = fitted(example, n, "cut")
            assert cut.input_ids.tolist() == ids[:n].tolist()
            (stopped,) = fitted(example, n, "cut_keep_stop")
            assert stopped.input_ids[: n - 1].tolist() == ids[: n - 1].tolist()
            if trained[n - 1] and trained[n - 2]:  # the cut is inside an answer
                assert stopped.input_ids[-1] == 2
                assert stopped.is_trained[-1]
            (prompt,) = fitted(example, n, "cut_prompt")
            assert prompt.input_ids[: len(bos)].tolist() == bos.tolist()
            assert subsequence(prompt.input_ids, ids)
            answer = ids[first:]
            room = n - len(bos)
            assert prompt.input_ids[-min(len(answer), room) :].tolist() == answer[:room].tolist()
            pieces = fitted(example, n, "split")
            for piece in pieces:
                assert piece.input_ids[: len(bos)].tolist() == bos.tolist()
                assert piece.is_trained.any()
            learnt = np.concatenate([p.input_ids[p.is_trained] for p in pieces])
            assert learnt.tolist() == ids[trained].tolist()
            assert fitted(example, n, "drop") == []


def test_a_question_that_is_cut_gets_no_stop_token():
    """Where questions are trained too, the model would learn to stop in the middle of one."""
    (example,) = encoder("bytes", "guanaco", train_on="everything").encode([ROWS[1]])[0]
    for n in range(2, len(example.input_ids)):
        (row,) = fitted(example, n, "cut_keep_stop")
        if not example.is_answer[n - 1]:
            assert row.input_ids.tolist() == example.input_ids[:n].tolist()


def test_a_cut_answer_gets_its_own_stop_token_back():
    """Which counts as much as the answer does, not as the next one."""
    half, whole = Message("assistant", "a" * 30, weight=0.5), Message("assistant", "b")
    row = Conversation((Message("user", "q"), half, Message("user", "q"), whole))
    (example,) = encoder("bytes", "guanaco").encode([row])[0]
    first = int(np.flatnonzero(example.is_trained)[0])
    (cut,) = fitted(example, first + 10, "cut_keep_stop")
    assert cut.input_ids[-1] == 2
    assert cut.weights is not None
    assert cut.weights[first:].tolist() == [0.5] * 10


# -- what is counted -----------------------------------------------------------------------------


def fit(with_it: Encoder, rows: list[Conversation], n: int, policy: Any) -> ChunkResult:
    chunk = [(Place("rows", number + 1), row, 0) for number, row in enumerate(rows)]
    encode = ChunkEncoder(with_it, Limits(max_length=n, overlong=policy))
    return encode(chunk, [0] * len(chunk))


@pytest.mark.parametrize("train_on", TRAIN_ON)
@pytest.mark.parametrize("policy", POLICIES)
def test_lost_tokens_are_counted_exactly_and_so_is_the_length_that_would_keep_them(
    policy: Overlong, train_on: TrainOn
):
    """By brute force: what is kept at every length is what ``needed`` says needs no more."""
    with_it = encoder("bytes-bos", "guanaco", train_on=train_on)
    for row in [*ROWS, asked("q" * 30, "a"), asked("q", "a" * 30, system="s" * 20)]:
        total = fit(with_it, [row], 10_000, policy).report.num_trained_tokens
        length = fit(with_it, [row], 10_000, policy).report.longest
        for n in range(2, length + 3):
            result = fit(with_it, [row], n, policy)
            kept = int(result.chunk.is_trained.sum())
            assert result.report.num_trained_tokens == kept
            assert result.report.num_lost_tokens == total - kept
            assert int(result.needed[: n + 1].sum()) == kept
            assert int(result.needed.sum()) == total


def test_rows_without_a_trained_answer_are_dropped_and_lose_nothing_to_length():
    """No length would keep them, so no length is to be blamed, or named."""
    silent = Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "a"),
            Message("assistant", "b", weight=0.0),
        )
    )
    for train_on in TRAIN_ON:
        result = fit(encoder("bytes", "guanaco", train_on=train_on), [silent, ROWS[0]], 500, "cut")
        assert result.report.num_dropped == result.report.num_untrained == 1
        assert result.report.num_lost_tokens == 0
        assert result.needed.sum() == result.report.num_trained_tokens


def test_rows_whose_every_answer_has_no_weight_are_an_error_that_blames_no_length():
    report = DataReport(num_dropped=2, num_untrained=2, untrained=["rows.jsonl, row 1"], longest=9)
    with pytest.raises(ConfigurationError) as caught:
        check_split(report, np.zeros(0, np.int64), Limits(), "data.x", "guanaco")
    assert str(caught.value) == (
        "data.x: nothing to train on, no answer has a weight above 0 (first: rows.jsonl, row 1)."
    )


@pytest.mark.parametrize("train_on", TRAIN_ON)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_length_that_an_error_names_passes_and_one_less_does_not(
    policy: Overlong, train_on: TrainOn
):
    tokenizer = build("bytes")
    with_it = Encoder(load_template("guanaco", tokenizer), tokenizer, train_on)
    rows = [{"prompt": "q" * (7 * n % 50), "response": "a" * (11 * n % 60 + 1)} for n in range(30)]

    def prepare(n: int) -> None:
        limits = Limits(max_length=n, overlong=policy, max_lost_ratio=0.1)
        prepare_split(RowSources.parse(rows), with_it, limits, "data.x")

    if policy == "split":
        for n in range(20, 60, 7):
            prepare(n)  # which loses nothing
        return
    with pytest.raises(ConfigurationError) as caught:
        prepare(40)
    named = int(str(caught.value).split("data.max_length ")[2].split()[0])
    prepare(named)
    with pytest.raises(ConfigurationError, match=f"data.max_length {named} would keep"):
        prepare(named - 1)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.29, 0.5, 0.57, 0.99])
def test_the_sufficient_length_is_the_smallest(ratio: float):
    """By trying all of them, with the very division that the report's ratio is."""
    for seed in range(20):
        needed = np.random.default_rng(seed).integers(0, 8, size=60)
        needed[: seed % 5] = 0
        total = int(needed.sum())
        tried = [n for n in range(60) if int(needed[n + 1 :].sum()) / total <= ratio]
        assert sufficient_length(needed, ratio) == tried[0]
    exact = np.array([0, 71, 29])
    assert sufficient_length(exact, 0.29) == 1


def test_needed_lengths_of_a_row_without_trained_tokens_are_none():
    (example,) = encoder("bytes", "guanaco").encode([ROWS[0]])[0]
    untrained = example._replace(is_trained=np.zeros_like(example.is_trained))
    for policy in POLICIES:
        assert len(needed_lengths(untrained, policy)) == 0


@pytest.mark.parametrize(("max_length", "is_said"), [(600, True), (512, True), (256, False)])
def test_rows_past_the_bases_last_position_are_said_once(
    tiny_base: Path, caplog: pytest.LogCaptureFixture, max_length: int, is_said: bool
):
    """The tiny base has 256 positions (``max_position_embeddings`` of its configuration)."""
    long = [{"prompt": f"q{n}", "response": "7" * 700} for n in range(5)]
    data = InstructionDataModule(
        long, tokenizer=str(tiny_base), max_length=max_length, max_lost_ratio=1.0, val_size=0
    )
    data.setup("fit")
    told = [record.getMessage() for record in caplog.records if "positions" in record.getMessage()]
    assert len(told) == int(is_said)
    if is_said:
        assert told[0] == (
            f"data.sources: the longest row has {max_length} tokens, and '{tiny_base}' knows 256 "
            "positions (max_position_embeddings); lower data.max_length, unless its positions are "
            "scaled."
        )
