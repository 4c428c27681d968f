"""The page as a browser reads it: its tokens are the run's, and nothing of the data is markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from looking import BAD, SCRIPT, VAL, run_words, write_rows

from qlora_pl.inspection.data.numbers import DataNumbers, measure
from qlora_pl.inspection.data.page import SECTIONS, page
from qlora_pl.inspection.data.run_data import Documents, RunData, read_run
from qlora_pl.inspection.data.token_markup import FIRST_SHOWN, LAST_SHOWN, tokens_markup
from qlora_pl.inspection.data.traced_rows import ShownRow, choose_rows, kept_positions, trace_rows

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # runs are parsed in this process

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Token(NamedTuple):
    """A box of the page."""

    id: int
    classes: frozenset[str]


class Reader(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str]]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []  # of each row's tokens
        self.tokens: list[list[Token]] = []
        self.exact: list[str] = []  # of each <pre>
        self.feed(html)
        self.close()
        assert self.open == [], "a tag is left open"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.append((tag, values))
        if tag in VOID:
            return
        self.open.append((tag, values))
        classes = frozenset(values.get("class", "").split())
        if tag == "div" and "tokens" in classes:
            self.texts.append("")
            self.tokens.append([])
        elif "token" in classes and "data-id" in values:
            self.tokens[-1].append(Token(int(values["data-id"]), classes))
        elif tag == "pre":
            self.exact.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if any("tokens" in values.get("class", "").split() for _, values in self.open):
            self.texts[-1] += data
        if any(tag == "pre" for tag, _ in self.open):
            self.exact[-1] += data


class Looked(NamedTuple):
    """A run that was looked at."""

    run: RunData
    numbers: DataNumbers
    documents: dict[str, Documents]
    rows: list[ShownRow]
    html: str


def look(tiny_base: Path, folder: Path, *more: str, every: bool = True) -> Looked:
    """All rows of the bad file, or those that are shown by default."""
    train = write_rows(folder / "train.jsonl", BAD)
    val = write_rows(folder / "val.jsonl", VAL)
    words = run_words(train, "--data.val_sources", str(val), *more)[1:]
    run = read_run([word.replace("BASE", str(tiny_base)) for word in words])
    numbers, documents = measure(run)
    count = len(BAD) if every else None
    choices = choose_rows(documents, run.data.max_length, numbers.odd, count=count)
    rows = trace_rows(documents, choices, run.data.encoder, run.data.limits)
    return Looked(run, numbers, documents, rows, page(numbers, rows))


@pytest.fixture(scope="module")
def looked(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Looked:
    """Cut to 256 tokens, each row shown."""
    folder = tmp_path_factory.mktemp("looked")
    return look(tiny_base, folder, "--data.max_length", "256")


def test_the_page_needs_nothing_and_runs_nothing(looked: Looked) -> None:
    read = Reader(looked.html)
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "form", "base"}
    for tag, values in read.tags:
        assert not [name for name in values if name.startswith("on")], (tag, values)
        assert "src" not in values
        assert values.get("href", "#").startswith("#")
    assert "url(" not in looked.html
    assert "@import" not in looked.html
    policies = [v["content"] for _, v in read.tags if "Policy" in v.get("http-equiv", "")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    ids = [values["id"] for tag, values in read.tags if tag == "section"]
    assert ids == list(SECTIONS)


def test_the_text_of_a_row_is_the_text_that_was_tokenised(looked: Looked) -> None:
    """Markup, Arabic, tabs and control tokens of the rows among it, character by character."""
    read = Reader(looked.html)
    assert len(read.texts) == len(BAD)
    for row, text, exact, source in zip(looked.rows, read.texts, read.exact, BAD, strict=True):
        assert text == row.text == json.loads(exact)
        assert source["response"].strip() in text
    assert any(SCRIPT in text for text in read.texts)


def test_the_classes_of_tokens_are_the_labels_of_the_run(looked: Looked) -> None:
    """Ids and labels as the data module hands them to the loader."""
    read = Reader(looked.html)
    split = looked.run.data.splits["train"]
    special = set(looked.run.data.tokenizer.all_special_ids)
    assert len(split.rows) == len(BAD)
    for number, tokens in enumerate(read.tokens):
        ids, labels = split.rows[number]
        kept = [token for token in tokens if "lost" not in token.classes]
        assert [token.id for token in kept] == ids.tolist()
        assert ["trained" in token.classes for token in kept] == (labels >= 0).tolist()
        assert all(("special" in t.classes) == (t.id in special) for t in tokens)
    lost = [number for number, tokens in enumerate(read.tokens) if len(tokens) > 256]
    assert lost == [len(BAD) - 1]
    assert sum("lost" in token.classes for token in read.tokens[-1]) == len(read.tokens[-1]) - 256


@pytest.mark.parametrize("overlong", ["cut", "cut_keep_stop", "cut_prompt", "split", "drop"])
def test_what_is_shown_as_left_out_is_what_the_run_leaves_out(
    overlong: str, looked: Looked
) -> None:
    """``kept_positions`` against the encoder's own rows."""
    encoder = looked.run.data.encoder
    limits = replace(looked.run.data.limits, overlong=overlong, max_length=90)  # type: ignore[arg-type]
    for _, conversation in looked.documents["train"]:
        ((example,),) = encoder.encode([conversation])
        pieces = kept_positions(example, limits, encoder)
        rows = [r for r in encoder.fit(example, limits) if (r.is_answer & r.is_trained).any()]
        assert [example.input_ids[places].tolist() for places in pieces] == [
            row.input_ids.tolist() for row in rows
        ]


def test_by_default_the_rows_that_tell_most_are_shown(
    looked: Looked, tiny_base: Path, tmp_path: Path
) -> None:
    choices = choose_rows(looked.documents, 256, looked.numbers.odd)
    first, longest, *odd = choices
    assert (first.number, first.reason) == (0, "the first row")
    assert longest.number == len(BAD) - 1
    assert longest.reason == "the longest row; most trained tokens behind data.max_length"
    assert [choice.reason for choice in odd] == [kind.name for kind in looked.numbers.odd[:4]]


@pytest.mark.parametrize(("count", "numbers"), [(1, [0]), (3, [0, 15, 30]), (99, list(range(31)))])
def test_so_many_rows_are_evenly_spread(count: int, numbers: list[int], looked: Looked) -> None:
    choices = choose_rows(looked.documents, 256, [], count=count)
    assert [choice.number for choice in choices] == numbers


def test_a_row_is_found_by_its_file_and_number(looked: Looked) -> None:
    wanted = [("train.jsonl", 30), ("val.jsonl", 2), ("", 31)]
    choices = choose_rows(looked.documents, 256, [], wanted)
    assert [(c.split, c.number) for c in choices] == [("train", 29), ("val", 1), ("train", 30)]


def test_a_row_of_very_many_tokens_is_shown_in_part(looked: Looked) -> None:
    row = looked.rows[-1]
    tokens = row.tokens * (1 + (FIRST_SHOWN + LAST_SHOWN) // len(row.tokens))
    markup = tokens_markup(row._replace(tokens=tokens))
    assert markup.count("data-id=") == FIRST_SHOWN + LAST_SHOWN
    hidden = len(tokens) - FIRST_SHOWN - LAST_SHOWN
    assert f"{hidden:,} tokens are not shown" in markup
    assert re.search(rf'title="{len(tokens) - 1}: id ', markup)  # the last one has its own number


def test_what_is_odd_is_quoted_and_never_markup(looked: Looked) -> None:
    assert "<script" not in looked.html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in looked.html


def test_invisible_characters_of_an_excerpt_are_spelled_out() -> None:
    from qlora_pl.inspection.cells import excerpt

    assert excerpt("a\u202eb\x9d<") == "&quot;a\\u202eb\\u009d&lt;&quot;"


def test_the_first_batch_is_drawn_token_by_token(looked: Looked) -> None:
    """Widths of the bars, summed up from the page, are the labels of the loader's first batch."""
    batch: Any = next(iter(looked.run.data.train_dataloader()))
    drawn = re.findall(r"<title>([\d,]+) tokens (\w+)</title>", looked.html)
    sums = dict.fromkeys(("trained", "read", "padding"), 0)
    for count, kind in drawn:
        sums[kind] += int(count.replace(",", ""))
    labels, mask = np.asarray(batch["labels"]), np.asarray(batch["attention_mask"])
    assert sums["trained"] == (labels >= 0).sum()
    assert sums["padding"] == (mask == 0).sum()
    assert sum(sums.values()) == labels.size
