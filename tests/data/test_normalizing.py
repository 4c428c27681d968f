"""Sources -> conversations: what is counted, what is skipped, and when too much is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import asked

from qlora_pl.data.conversation import Message
from qlora_pl.data.reading.normalizing import NUM_LISTED, ReadingReport, read_conversations
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.errors import ConfigurationError, DatasetFormatError

GOOD = {"prompt": "q", "response": "a"}
BAD = {"prompt": "q", "response": ""}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def skip(sources: Any, ratio: float = 0.01) -> tuple[list[int], ReadingReport]:
    report = ReadingReport()
    found = read_conversations(RowSources.parse(sources), "skip", report, ratio)
    return [place.row for place, _ in found], report


# -- skipping --------------------------------------------------------------------------------------


def test_bad_rows_are_counted_and_the_first_ones_listed(tmp_path: Path):
    rows = [GOOD] * 3000
    for number in range(0, 3000, 100):  # 30 of them: exactly 1 %
        rows[number] = BAD
    path = write(tmp_path / "rows.jsonl", rows)
    numbers, report = skip(path)
    assert numbers == [n for n in range(1, 3001) if n % 100 != 1]
    assert report.num_rows == {path: 2970}
    assert report.num_skipped == {path: 30}
    assert [row.place.row for row in report.skipped] == [100 * n + 1 for n in range(NUM_LISTED)]
    assert str(report.skipped[0]) == (
        f"{path}, row 1: its answer (message 2) is empty. Mend or remove the row."
    )
    assert str(report).splitlines()[0] == (
        f"{path}: 2,970 rows, format prompt-response (guessed), 30 bad rows skipped"
    )
    assert len(str(report).splitlines()) == 1 + NUM_LISTED


@pytest.mark.parametrize(
    ("num_bad", "total", "ratio", "passes"),
    [
        (9, 20, 0.01, True),  # fewer than ten are never too many
        (10, 20, 0.01, False),
        (10, 1000, 0.01, True),  # 1 % is allowed
        (11, 1000, 0.01, False),
        (500, 1000, 0.5, True),
        (501, 1000, 0.5, False),
        (10, 1000, 0.0, False),
        (1, 1, 0.01, False),  # nothing would be left
        (3, 3, 1.0, False),
    ],
)
@pytest.mark.parametrize("turned", [False, True], ids=["bad ones first", "bad ones last"])
def test_too_many_bad_rows_stop_the_run_wherever_they_stand(
    tmp_path: Path, num_bad: int, total: int, ratio: float, passes: bool, turned: bool
):
    rows = [BAD] * num_bad + [GOOD] * (total - num_bad)
    path = write(tmp_path / "rows.jsonl", rows[::-1] if turned else rows)
    if passes:
        assert len(skip(path, ratio)[0]) == total - num_bad
        return
    with pytest.raises(DatasetFormatError) as caught:
        skip(path, ratio)
    first = total - num_bad + 1 if turned else 1
    assert str(caught.value).startswith(
        f"{path}: {num_bad} of {total:,} rows are bad, and at most {ratio:.1%} may be left out; "
        f"mend them, or set another format. The first: {path}, row {first}: "
    )


def test_the_share_is_each_sources_own(tmp_path: Path):
    good = write(tmp_path / "good.jsonl", [GOOD] * 5000)
    bad = write(tmp_path / "bad.jsonl", [GOOD] * 10 + [BAD] * 10)
    with pytest.raises(DatasetFormatError, match="10 of 20 rows are bad"):
        skip([good, bad])


def test_rows_in_memory_are_skipped_too():
    numbers, report = skip([GOOD, "no row", BAD, GOOD])
    assert numbers == [1, 4]
    assert report.num_skipped == {"rows in memory": 2}


def test_a_row_whose_columns_fit_no_format_is_skipped_as_the_first_too(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"x": 1}, GOOD])
    numbers, report = skip(path)
    assert numbers == [2]
    assert "no format fits the columns 'x'" in report.skipped[0].reason


# -- formats ---------------------------------------------------------------------------------------


def test_a_limit_counts_conversations_and_not_messages_of_trees(tmp_path: Path):
    rows = []
    for tree in "cab":
        rows.append({"message_id": tree, "parent_id": None, "role": "prompter", "text": tree})
        rows.append({"message_id": tree + "1", "parent_id": tree, "role": "assistant", "text": "x"})
    path = write(tmp_path / "oasst.jsonl", rows)
    for settings, expected in (({}, "abc"), ({"limit": 2}, "ab")):
        report = ReadingReport()
        found = read_conversations(RowSources.parse({"path": path} | settings), report=report)
        assert [row.messages[0].content for _, row in found] == list(expected)
        assert report.formats == {path: "oasst (guessed; text would fit too)"}
        assert report.num_rows == {path: len(expected)}


def test_trees_may_lie_in_several_files(tmp_path: Path):
    """A reply and its prompt in two of them."""
    rows = [
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "q"},
        {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "a"},
    ]
    for name, row in zip(("1.jsonl", "2.jsonl"), reversed(rows), strict=True):
        write(tmp_path / name, [row])
    found = list(read_conversations(RowSources.parse(str(tmp_path))))
    assert [(place.source, row) for place, row in found] == [
        (str(tmp_path / "2.jsonl"), asked("q", "a"))
    ]


@pytest.mark.parametrize("settings", [{"languages": ["en"]}, {"replies": "all"}])
def test_settings_of_trees_are_refused_for_other_rows(tmp_path: Path, settings: Any):
    path = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(ConfigurationError) as caught:
        list(read_conversations(RowSources.parse({"path": path} | settings)))
    assert str(caught.value) == (
        f"data.sources ({path}): languages and replies are for message trees, and format is "
        "prompt-response; remove them."
    )


def test_a_renamed_column_tells_the_format(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "reply": "a"}])
    sources = RowSources.parse({"path": path, "columns": {"completion": "reply"}})
    report = ReadingReport()
    assert [row for _, row in read_conversations(sources, report=report)] == [asked("q", "a")]
    assert report.formats == {path: "prompt-completion (guessed)"}


def test_text_that_could_be_cut_into_turns_is_said_to_be_so():
    """It would train on the questions too, which may be meant: Guanaco's paper did."""
    for text, hint in (
        ("### Human: q### Assistant: a", "its first row has the turns of guanaco"),
        ("<human>: q\n<bot>: a", "its first row has the turns of chip2"),
        ("no turns, though <human>: is in it", "guanaco would fit too"),
    ):
        report = ReadingReport()
        ((_, row),) = read_conversations(RowSources.parse([{"text": text}]), report=report)
        assert row.is_plain_text
        assert report.formats == {"rows in memory": f"text (guessed; {hint})"}


def test_a_part_of_the_prompt_that_is_not_read_is_said(caplog: pytest.LogCaptureFixture):
    rows = [{"instruction": "q", "output": "a", "system": "s", "history": [], "id": 1}] * 3
    assert len(list(read_conversations(RowSources.parse(rows)))) == 3
    (line,) = [message for message in caplog.messages if "not used" in message]
    assert line.startswith("rows in memory: column 'system' is not used by format alpaca;")


def test_a_folder_of_many_files_says_its_format_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for number in range(5):
        write(tmp_path / f"{number}.jsonl", [GOOD])
    with caplog.at_level("INFO"):
        assert len(list(read_conversations(RowSources.parse(str(tmp_path))))) == 5
    (line,) = [message for message in caplog.messages if "format" in message]
    assert line == f"{tmp_path}: format prompt-response (guessed)"


def test_trees_behind_other_rows_in_a_folder_are_to_be_named_apart(tmp_path: Path):
    write(tmp_path / "a.jsonl", [GOOD])
    write(tmp_path / "b.jsonl", [{"message_tree_id": "a", "prompt": {}}])
    with pytest.raises(DatasetFormatError) as caught:
        list(read_conversations(RowSources.parse(str(tmp_path))))
    assert str(caught.value) == (
        f"{tmp_path / 'b.jsonl'}, row 1: rows of format 'oasst' are not read among those of "
        "others; name the file as a source of its own."
    )


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "weight"),
    [
        ({}, 1.0),
        ({"weight": 0}, 0.0),
        ({"weight": 2}, 2.0),
        ({"weight": 0.25}, 0.25),
        ({"train": True}, 1.0),
        ({"train": False}, 0.0),
        ({"weight": None, "train": None}, 1.0),  # as a Parquet column fills in what is absent
        ({"weight": None, "train": False}, 0.0),
    ],
)
@pytest.mark.parametrize(
    ("column", "speaker", "said"),
    [
        ("messages", "role", "content"),
        ("conversations", "from", "value"),
        ("conversations", "role", "content"),  # both pairs of keys, whatever the column is called
        ("messages", "from", "value"),
    ],
)
def test_a_turn_carries_its_weight(
    column: str, speaker: str, said: str, more: dict[str, Any], weight: float
):
    turns = [
        {speaker: "user", said: "q"},
        {speaker: "assistant", said: "a", **more},
        {speaker: "USER", said: "r"},
        {speaker: "ChatGPT", said: "b"},
    ]
    ((_, row),) = read_conversations(RowSources.parse([{column: turns}]))
    assert row.messages == (
        Message("user", "q"),
        Message("assistant", "a", weight=weight),
        Message("user", "r"),
        Message("assistant", "b"),
    )
