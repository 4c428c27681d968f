"""What is counted, against counts of another kind: by hand, by brute force, by another run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from looking import BAD, LONG, NUM_PLAIN, VAL, run_words, write_rows

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.encoder import Encoder, TrainOn
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.places import Place
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.preparation import prepare_split
from qlora_pl.data.templates.loading import load_template
from qlora_pl.inspection.data.numbers import DataNumbers, measure
from qlora_pl.inspection.data.odd_rows import CONTROL_TOKEN, find_odd_rows
from qlora_pl.inspection.data.policies import POLICIES, needed_by_rows, policy_losses
from qlora_pl.inspection.data.run_data import read_run
from qlora_pl.inspection.data.traced_rows import choose_rows, trace_rows
from qlora_pl.inspection.data.wording import count_letters, normalized, wording

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # runs are parsed in this process


@pytest.fixture(scope="module")
def bad(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> DataNumbers:
    """The numbers of the bad file, cut to 256 tokens."""
    folder = tmp_path_factory.mktemp("bad")
    train = write_rows(folder / "train.jsonl", BAD)
    val = write_rows(folder / "val.jsonl", VAL)
    words = run_words(train, "--data.val_sources", str(val), "--data.max_length", "256")[1:]
    return measure(read_run([word.replace("BASE", str(tiny_base)) for word in words]))[0]


def test_sources_and_splits_are_counted(bad: DataNumbers) -> None:
    assert [(s.num_rows, s.num_kept) for s in bad.sources] == [(31, 31), (4, 4)]
    assert {s.format for s in bad.sources} == {"prompt-response (guessed)"}
    assert [bad.splits[name].num_rows for name in ("train", "val")] == [31, 4]
    assert bad.splits["train"].longest == 256
    assert sum(bad.lengths.counts) == len(BAD)
    assert bad.lengths.num_too_long == bad.reports["data.sources"].num_cut == 1


def test_duplicates_are_those_that_were_put_there(bad: DataNumbers) -> None:
    def rows(groups: list) -> list[list[int]]:
        return sorted([place.row for place in group.places] for group in groups)

    assert rows(bad.exact.groups) == [[1, 21]]
    assert rows(bad.similar.groups) == [[1, 21], [2, 22], [3, 23]]
    assert (bad.similar.num_groups, bad.similar.num_rows) == (3, 6)
    nearly = next(group for group in bad.similar.groups if group.places[0].row == 3)
    assert nearly.similarity == 15 / 16


def test_what_validation_shares_with_training_is_counted(bad: DataNumbers) -> None:
    """Row 2 is there, row 3 asks what is asked, row 4 is nearly there with its question."""
    overlap = bad.overlap
    assert overlap is not None
    assert (overlap.num_val, overlap.num_same_row) == (4, 1)
    assert (overlap.num_similar_row, overlap.num_same_prompt) == (2, 3)
    shared = {val.rpartition(" ")[2]: what for val, _, what in overlap.examples}
    assert shared == {"2": "the whole row", "3": "the prompt", "4": "nearly the whole row"}


def test_odd_rows_are_those_that_were_put_there(bad: DataNumbers) -> None:
    found = {kind.name: [place.row for place, _ in kind.examples] for kind in bad.odd}
    assert found == {
        "HTML entities": [24],
        "very short answer": [25],
        "answer repeats the question": [26],
        "repeated character": [27],
        "damaged characters": [28],
        CONTROL_TOKEN: [29],
    }
    assert all(kind.num_rows == len(kind.examples) for kind in bad.odd)


def test_scripts_are_shares_of_letters(bad: DataNumbers) -> None:
    text = "".join(text for row in [*BAD, *VAL] for text in row.values())
    arabic = sum(character.isalpha() and "\u0600" <= character <= "\u06ff" for character in text)
    assert bad.letters["Arabic"] == arabic > 0
    assert sum(bad.letters.values()) == sum(character.isalpha() for character in text)


def test_a_split_that_is_set_apart_is_compared_with_the_rest(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Every row stands there three times, so each one set apart is in training unless all are."""
    rows = [row for row in BAD[:NUM_PLAIN] for _ in range(3)]
    words = run_words(write_rows(tmp_path / "rows.jsonl", rows), "--data.val_size", "12")[1:]
    run = read_run([word.replace("BASE", str(tiny_base)) for word in words])
    numbers, _ = measure(run)
    asked = {
        name: Counter(c.messages[0].content for c in run.data.splits[name].conversations)
        for name in ("train", "val")
    }
    both = sum(count for text, count in asked["val"].items() if text in asked["train"])
    assert numbers.overlap is not None
    assert numbers.overlap.num_val == 12
    assert numbers.overlap.num_same_row == numbers.overlap.num_same_prompt == both > 0
    several = [count for count in asked["train"].values() if count > 1]
    assert (numbers.exact.num_groups, numbers.exact.num_rows) == (len(several), sum(several))


def test_rows_that_are_dropped_are_looked_at_too(tiny_base: Path, tmp_path: Path) -> None:
    long = {"prompt": "Long?", "response": LONG}
    rows = write_rows(tmp_path / "rows.jsonl", [*BAD[:NUM_PLAIN], long, long])
    more = ("--data.overlong", "drop", "--data.max_length", "256", "--data.val_size", "5")
    words = [word.replace("BASE", str(tiny_base)) for word in run_words(rows, *more)[1:]]
    numbers, documents = measure(read_run(words))
    assert numbers.reports["data.sources"].num_dropped == 2
    assert numbers.sources[0].num_rows == NUM_PLAIN + 2
    assert numbers.sources[0].num_kept == NUM_PLAIN
    assert [len(documents[name]) for name in ("train", "val")] == [NUM_PLAIN + 2 - 5, 5]
    assert numbers.exact.num_rows == 2


# -- lengths -----------------------------------------------------------------------------------

ROWS = [
    {
        "system": "",
        "prompt": f"Question {n}? " + "and " * (7 * n % 40),
        "response": "word " * (1 + 11 * n % 60),
    }
    for n in range(40)
]


@pytest.mark.parametrize("overlong", POLICIES)
@pytest.mark.parametrize(
    ("template", "train_on"),
    [("alpaca", "answers"), ("chat", "answers"), ("plain", "answers"), ("chat", "everything")],
)
def test_losses_are_those_of_a_run_with_that_setting(
    template: str, train_on: TrainOn, overlong: str, tokenizer: object
) -> None:
    """Every policy's line against the report of a split that is prepared with it."""
    encoder = Encoder(load_template(template, tokenizer), tokenizer, train_on)
    sources = RowSources.parse(ROWS)
    limits = Limits(max_length=150 if template == "alpaca" else 60, max_lost_ratio=0.1)
    endless = Limits(max_length=10**6)
    whole = prepare_split(sources, encoder, endless, "data.sources")
    lines = {line.overlong: line for line in policy_losses(whole, encoder, limits)}
    chosen = replace(limits, overlong=overlong)  # type: ignore[arg-type]
    lenient = replace(chosen, max_lost_ratio=1.0)
    split = prepare_split(sources, encoder, lenient, "data.sources", noted=[])
    line = lines[overlong]
    assert line.num_lost_tokens == split.report.num_lost_tokens
    assert line.lost_ratio == split.report.lost_ratio
    assert line.num_left_out == split.report.num_dropped
    if overlong == "split":
        assert line.sufficient_length is None
        return
    assert line.sufficient_length is not None
    for length, is_enough in ((line.sufficient_length, True), (line.sufficient_length - 1, False)):
        at = replace(lenient, max_length=length)
        report = prepare_split(sources, encoder, at, "data.sources", noted=[]).report
        assert (report.lost_ratio <= limits.max_lost_ratio) == is_enough


@pytest.mark.parametrize("template", ["chat", "llama2"])  # llama2 writes BOS itself
@pytest.mark.parametrize("overlong", [p for p in POLICIES if p != "split"])
def test_the_lengths_that_tokens_need_are_the_encoders(
    overlong: str, template: str, tokenizer: object
) -> None:
    encoder = Encoder(load_template(template, tokenizer), tokenizer)
    whole = prepare_split(RowSources.parse(ROWS), encoder, Limits(max_length=10**6), "data.sources")
    examples = [e for c in whole.conversations for (e,) in encoder.encode([c])]
    limits = Limits(overlong=overlong)  # type: ignore[arg-type]
    expected = np.bincount(np.concatenate([encoder.needed(e, limits) for e in examples]))
    found = needed_by_rows(whole.rows, overlong, encoder.tokenizer.bos_token_id)  # type: ignore[arg-type]
    assert np.array_equal(found[: len(expected)], expected)
    assert not found[len(expected) :].any()


# -- words and oddities ------------------------------------------------------------------------


def test_normalising_levels_what_copies_differ_in() -> None:
    assert normalized("  \uff28ello\u00a0\n WORLD ") == "hello world"
    assert normalized("日本語 and") == "日 本 語 and"
    row = (Message("system", "S"), Message("user", "Q", context="C"), Message("assistant", "A"))
    assert wording(Conversation(row)) == "q c a"


def test_letters_are_counted_as_python_classes_them() -> None:
    drawn = random.Random(0)
    ranges = [(0x20, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF)]
    text = "".join(chr(drawn.randint(*drawn.choice(ranges))) for _ in range(5000)) + "𠀀ß1_ -"
    counts = count_letters([text[:2500], text[2500:]])
    assert sum(counts.values()) == sum(character.isalpha() for character in text)
    assert counts["Han"] == sum(("一" <= c <= "鿿" and c.isalpha()) or c == "𠀀" for c in text)


ODD: list[tuple[str, str, str, bool]] = [
    ("very short answer", "Q?", "OK", True),
    ("very short answer", "Q?", "Yes", False),
    ("answer repeats the question", "Say  IT", "say it", True),
    ("answer repeats the question", "Say it", "say it twice", False),
    ("empty question", " \n", "An answer.", True),
    ("repeated character", "Q?", "ha" + "a" * 19, True),
    ("repeated character", "Q?", "-" * 80 + " " * 80 + "=" * 80, False),
    ("damaged characters", "donâ€™t", "An answer.", True),
    ("damaged characters", "Q?", "cafÃ© Ã la carte", True),
    ("damaged characters", "Â£5", "An answer.", True),
    ("damaged characters", "Q?", "lost \ufffd", True),
    ("damaged characters", "château à la São Ângela?", "naïve, ÂNGELA, l\u2019été", False),
    ("control characters", "Q?", "a\x08b", True),
    ("control characters", "Q?", "a\tb\r\nc", False),
    ("text direction overridden", "Q?", "a\u202eb", True),
    ("HTML entities", "Q?", "R&amp;D &#39;s", True),
    ("HTML entities", "Q?", "R&D; a && b;", False),
]


@pytest.mark.parametrize(("kind", "prompt", "answer", "is_found"), ODD)
def test_a_kind_of_odd_row_is_found_and_what_looks_like_it_is_not(
    kind: str, prompt: str, answer: str, is_found: bool
) -> None:
    row = Conversation((Message("user", prompt), Message("assistant", answer)))
    found = find_odd_rows([(Place("rows", 1), row)], None)
    assert (kind in [item.name for item in found]) == is_found


# -- other shapes of rows and batches ------------------------------------------------------------


def words_of(base: Path, rows: Path, *more: str) -> list[str]:
    return [word.replace("BASE", str(base)) for word in run_words(rows, *more)[1:]]


def test_packs_are_seen_as_the_loader_makes_them(tiny_base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", BAD[:NUM_PLAIN])
    more = ("--data.packing", "true", "--data.max_length", "512", "--data.batch_size", "2")
    run = read_run(words_of(tiny_base, rows, *more, "--data.val_size", "2"))
    batch = next(iter(run.data.train_dataloader()))
    seen = measure(run)[0].batch
    assert seen is not None
    assert len(seen.lines) == len(batch["input_ids"])
    assert seen.num_rows == len(batch["row_ids"]) > len(seen.lines)
    assert seen.num_padding == batch["input_ids"].numel() - int(batch["document_lengths"].sum())
    lengths = np.diff([start for line in seen.lines for start in line.row_starts])
    expected = batch["document_lengths"].numpy()
    assert all(a == b or a < 0 for a, b in zip(lengths, expected, strict=False))


def test_rows_of_the_original_encoding_are_counted_by_both_limits(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Sides of 60 tokens at most: what is lost is what the run's own report says."""
    rows = write_rows(tmp_path / "rows.jsonl", BAD[: NUM_PLAIN + 3])
    more = ("--data.encoding", "original", "--data.template", "alpaca", "--data.val_size", "0")
    limits = ("--data.max_length", "200", "--data.max_target_length", "60")
    run = read_run(words_of(tiny_base, rows, *more, *limits, "--model.lora.trainable_tokens", "[]"))
    numbers, documents = measure(run)
    report = numbers.reports["data.sources"]
    by_name = {line.overlong: line for line in numbers.policies}
    assert set(by_name) == {"cut", "drop"}
    assert by_name["cut"].num_lost_tokens == report.num_lost_tokens > 0
    assert numbers.lengths.num_too_long == report.num_cut
    assert len(documents["train"]) == NUM_PLAIN + 3
    assert any("data.max_target_length" in problem for problem in numbers.problems)


def test_pairs_of_an_encoder_decoder_model_are_counted_and_traced(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """T5's: what is lost is what the run's own report says, and tokens are those of the loader."""
    rows = write_rows(tmp_path / "rows.jsonl", BAD[: NUM_PLAIN + 3])
    more = ("--data.template", "plain", "--data.val_size", "0", "--data.max_length", "60")
    run = read_run(words_of(saved("T5"), rows, *more))
    numbers, documents = measure(run)
    report = numbers.reports["data.sources"]
    by_name = {line.overlong: line for line in numbers.policies}
    assert by_name["cut"].num_lost_tokens == report.num_lost_tokens > 0
    assert by_name["cut"].lost_ratio == report.lost_ratio
    assert numbers.lengths.num_too_long == report.num_cut
    assert numbers.batch is not None
    assert numbers.batch.num_rows == run.data.batch_size
    choices = choose_rows(documents, None, numbers.odd, count=99)
    shown = trace_rows(documents, choices, run.data.encoder, run.data.limits)
    kept = [[t.id for t in row.tokens if t.id is not None and not t.is_lost] for row in shown]
    split = run.data.splits["train"].rows
    assert kept == [split[row][0].tolist() for row in range(len(split))]
