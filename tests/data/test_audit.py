"""What stops a run before any weight is loaded, and what is only counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE
from toy_tokenizers import TEXTS, build, spell

from qlora_pl.data.encoding.encoder import TOKENIZER_CHUNK, Encoder, TrainOn
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.audit import DataReport, Limits
from qlora_pl.data.rows.preparation import EncodedSplit, prepare_split
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import DatasetFormatError, QLoRAError

LONG = 10_000
SHORT, MIDDLE, WIDE = ({"prompt": "q", "response": "7" * number} for number in (4, 10, 40))


def audit(
    sources: Any,
    max_length: int = LONG,
    overlong: Any = "cut",
    max_lost_ratio: float = 1.0,
    template: str = "guanaco",
    chat_template: str | None = CHAT_TEMPLATE,
    train_on: TrainOn = "answers",
) -> EncodedSplit:
    tokenizer = build("bytes", chat_template)
    encoder = Encoder(load_template(template, tokenizer), tokenizer, train_on)
    limits = Limits(max_length=max_length, overlong=overlong, max_lost_ratio=max_lost_ratio)
    return prepare_split(RowSources.parse(sources), encoder, limits, "data.x")


def sentence(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(QLoRAError) as caught:
        audit(*arguments, **settings)
    return str(caught.value)


def prompt_length() -> int:
    """Tokens of the prompt "q"; a row has these, a space, a token for each digit, and a stop."""
    encoder = Encoder(load_template("guanaco", build("bytes")), build("bytes"))
    split = audit([SHORT])
    length = len(encoder.encode_prompt(split.conversations[0].prompt)[1])
    assert split.rows.lengths.tolist() == [length + 1 + 4 + 1]
    return length


# -- everything in order -------------------------------------------------------------------------


def test_every_row_is_kept_in_order_with_its_place(write_rows: Callable[..., Path]):
    """More rows than go to the tokenizer at a time."""
    number = TOKENIZER_CHUNK + 3
    path = write_rows([{"prompt": f"{n}?", "response": f"{n}!"} for n in range(number)])
    split = audit(path)
    assert len(split.rows) == split.report.num_rows == number
    for row in (0, TOKENIZER_CHUNK - 1, TOKENIZER_CHUNK, number - 1):
        ids, labels = split.rows[row]
        assert spell(build("bytes"), ids[labels >= 0]) == f" {row}!</s>"
        assert split.conversations[row].reference == f"{row}!"
        assert str(split.places[row]) == f"{path}, row {row + 1}"


def test_the_report_counts_rows_and_tokens():
    split = audit([{"prompt": text, "response": text} for text in TEXTS])
    report = split.report
    assert report.num_rows == len(TEXTS)
    assert report.num_tokens == len(split.rows.input_ids)
    assert report.num_trained_tokens == int(split.rows.is_trained.sum())
    assert report.longest == int(split.rows.lengths.max())
    assert (report.num_cut, report.num_dropped, report.num_lost_tokens) == (0, 0, 0)
    assert report.lost_ratio == 0
    assert report.formats == {"rows in memory": "prompt-response (guessed)"}
    assert f"{len(TEXTS)} rows" in str(report)


def test_a_selection_reports_on_itself():
    split = audit([SHORT, WIDE, MIDDLE])
    part = split.select(np.array([2, 0]))
    assert [c.reference for c in part.conversations] == ["7" * 10, "7" * 4]
    assert [place.row for place in part.places] == [3, 1]
    assert part.report.num_rows == 2
    assert (
        part.report.num_tokens == int(part.rows.lengths.sum()) == len(part.rows.compact().input_ids)
    )
    assert part.report.num_trained_tokens == 12 + 6
    assert part.report.longest == int(part.rows.lengths[0])
    assert split.select([]).report.num_rows == 0


def test_each_source_has_a_format_of_its_own_even_over_the_same_file(tmp_path: Path):
    """One file of two tasks, read twice; a format remembered by path would serve both."""
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "q", "response": "a", "text": "plain"}
    path.write_text(json.dumps(row) + "\n")
    split = audit(
        [
            {"path": str(path), "format": "text"},
            {"path": str(path), "format": "prompt-response"},
            {"path": str(path), "columns": {"question": "prompt", "answer": "text"}},
        ]
    )
    assert [c.reference for c in split.conversations] == ["plain", "a", "plain"]
    assert [c.is_plain_text for c in split.conversations] == [True, False, False]
    assert split.report.formats == {str(path): "text; prompt-response; question-answer (guessed)"}


def test_a_guessed_format_is_reported_with_its_runner_up(write_rows: Callable[..., Path]):
    path = write_rows([{"instruction": "q", "input": "", "output": "a"}])
    formats = audit(path).report.formats
    assert formats == {str(path): "alpaca (guessed; input-output would fit too)"}
    named = audit({"path": str(path), "format": "input-output"}).report.formats
    assert named == {str(path): "input-output"}


# -- bad rows ------------------------------------------------------------------------------------

GOOD = {"prompt": "q", "response": "a"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q"}, "no 'response' field; found 'prompt'. Set another format, or rename"),
        ({"prompt": "q", "response": 5}, "'response' holds int 5, expected text."),
        ({"prompt": "q", "response": ""}, "its answer (message 2) is empty. Mend or remove the"),
        ({"prompt": "q", "response": "\ud83d"}, "'response' holds half of a surrogate pair"),
        (["q", "a"], "expected a mapping of columns, got ['q', 'a']."),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(
    write_rows: Callable[..., Path], row: Any, expected: str
):
    path = write_rows([GOOD] * 600 + [row, GOOD])
    with pytest.raises(DatasetFormatError) as caught:
        audit(path)
    assert str(caught.value).startswith(f"{path}, row 601: {expected}")


def test_columns_without_a_format_are_named_with_their_file(write_rows: Callable[..., Path]):
    path = write_rows([{"q": "1", "a": "2"}])
    with pytest.raises(DatasetFormatError) as caught:
        audit(path)
    assert str(caught.value).startswith(f"{path}, row 1: no format fits the columns 'q', 'a'")


def test_a_row_that_the_chat_template_refuses_is_named(write_rows: Callable[..., Path]):
    refusing = (
        "{% if '!' in messages[0]['content'] %}{{ raise_exception('no shouting') }}{% endif %}"
    )
    path = write_rows([GOOD] * 600 + [{"prompt": "Q!", "response": "a"}, GOOD])
    found = sentence(path, template="chat", chat_template=refusing + CHAT_TEMPLATE)
    assert found.startswith(f"{path}, row 601: data.template: ")
    assert "no shouting" in found


# -- rows that are too long ----------------------------------------------------------------------


def test_cut_dropped_and_lost_are_counted():
    """By hand: rows of P + 6, P + 12 and P + 42 tokens, of which 6, 12 and 42 are trained."""
    length = prompt_length() + 12
    cut = audit([SHORT, MIDDLE, WIDE], length)
    assert cut.rows.lengths.tolist() == [length - 6, length, length]
    assert (cut.report.num_rows, cut.report.num_cut, cut.report.num_dropped) == (3, 1, 0)
    assert cut.report.num_trained_tokens == 6 + 12 + 12
    assert cut.report.num_lost_tokens == 30
    assert cut.report.lost_ratio == 30 / 60
    assert cut.report.longest == prompt_length() + 42
    assert "1 rows cut, 50.0% of trained tokens lost" in str(cut.report)

    dropped = audit([SHORT, MIDDLE, WIDE], length, overlong="drop")
    assert dropped.rows.lengths.tolist() == [length - 6, length]
    assert [place.row for place in dropped.places] == [1, 2]
    assert (dropped.report.num_rows, dropped.report.num_cut, dropped.report.num_dropped) == (
        2,
        0,
        1,
    )
    assert dropped.report.num_lost_tokens == 42
    assert "1 rows dropped" in str(dropped.report)


def test_a_row_whose_whole_answer_is_cut_away_is_dropped():
    length = prompt_length() + 6
    long_question = {"prompt": "q" * 50, "response": "7"}
    split = audit([SHORT, long_question], length)
    assert [place.row for place in split.places] == [1]
    assert (split.report.num_dropped, split.report.num_cut, split.report.num_lost_tokens) == (
        1,
        0,
        3,
    )


def test_a_long_row_can_be_an_error(write_rows: Callable[..., Path]):
    path = write_rows([SHORT, WIDE])
    length = prompt_length() + 12
    assert sentence(path, length, "error") == (
        f"{path}, row 2: {length + 30} tokens, more than data.max_length {length}. Raise it, or "
        "set data.overlong: cut or drop."
    )
    assert len(audit(path, length + 30, "error").rows) == 2


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_losing_more_than_the_budget_stops_the_run(overlong: str):
    """By hand: 30 of 60 trained tokens are cut away, or 42 of 60 dropped."""
    share = 30 / 60 if overlong == "cut" else 42 / 60
    arguments = ([SHORT, MIDDLE, WIDE], prompt_length() + 12, overlong)
    audit(*arguments, max_lost_ratio=share)
    found = sentence(*arguments, max_lost_ratio=share - 0.01)
    assert found.startswith(
        f"data.x: data.max_length {prompt_length() + 12} takes away {share:.1%}"
    )


# -- nothing to learn ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str):
    (tmp_path / name).write_text("[]" if name.endswith("json") else "")
    with pytest.raises(DatasetFormatError) as caught:
        audit(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: it holds no rows; leave it out, or fill it."


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_rows_whose_every_answer_is_cut_away_are_an_error(overlong: str):
    found = sentence([{"prompt": "q" * 50, "response": "a"}], 20, overlong)
    assert found.startswith("data.x: nothing to train on, no answer fits into data.max_length 20")


def test_rows_without_an_answer_are_dropped_even_if_prompts_are_trained():
    """Otherwise a file whose every answer is cut away would train on questions, without a word."""
    long = {"prompt": "q" * 50, "response": "7"}
    found = sentence([long], 40, train_on="everything")
    assert found.startswith("data.x: nothing to train on, no answer fits into data.max_length 40")
    split = audit([SHORT, long], 40, train_on="everything")
    assert [place.row for place in split.places] == [1]


@pytest.mark.parametrize("template", ["guanaco", "chat"])
def test_training_on_prompts_is_no_reason_to_miss_a_stop_token(template: str):
    """A chat template writes a newline after it, which then is the last trained token."""
    split = audit([SHORT], template=template, train_on="everything")
    assert split.report.num_unstopped == 0
    assert split.report.num_trained_tokens == split.report.num_tokens


UNSTOPPED = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}"
    "{% if 'stop' in m['content'] %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
"""A template that ends an answer only where it holds the word stop."""


def test_a_template_that_never_stops_is_refused():
    found = sentence([GOOD], template="chat", chat_template=UNSTOPPED)
    assert "1 answer does not end in a trained stop token under the template 'chat'" in found


def test_cut_rows_do_not_hide_rows_that_never_stop():
    """A dialogue cut after its first answer still ends in a stop token; a whole row must too."""
    dialogue = {
        "messages": [
            {"role": role, "content": content}
            for role, content in (
                ("user", "q stop"),
                ("assistant", "a stop"),
                ("user", "q" * 40),
                ("assistant", "a stop"),
            )
        ]
    }
    endless = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }
    stopping = UNSTOPPED.replace("'stop' in m['content']", "m['content'] != 'a'")
    settings = {"template": "chat", "chat_template": stopping, "max_length": 30}
    assert audit([dialogue] * 3, **settings).report.num_cut == 3
    assert "1 answer does not end" in sentence([dialogue, endless, dialogue, dialogue], **settings)


def test_a_cut_answer_needs_no_stop_token():
    length = prompt_length() + 12
    assert audit([WIDE, WIDE], length).report.num_cut == 2


def test_an_empty_report_divides_by_nothing():
    assert DataReport().lost_ratio == 0
