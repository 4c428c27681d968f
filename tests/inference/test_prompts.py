"""What is asked, out of words, files and standard input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from qlora_pl.errors import DatasetFormatError
from qlora_pl.inference.prompts import Prompt, read_prompts


def read(
    file: str | None = None, *words: str, skips: bool = False, stdin: str = ""
) -> list[Prompt]:
    return read_prompts(words, file, None, skips, io.StringIO(stdin))[0]


def test_words_come_first_and_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("third\n\nfourth\n")
    prompts = read(str(tmp_path / "more.txt"), "first", "second")
    assert [p.question for p in prompts] == ["first", "second", "third", "fourth"]
    assert [p.row for p in prompts] == [0, 1, 2, 3]
    assert prompts[3].where.endswith("more.txt, line 3")


def test_rows_of_json_csv_and_lists_are_the_same(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1, 2", "id": "a"}, {"prompt": "Why?", "id": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('instruction,input,prompt,id\nAdd.,"1, 2",,a\n,,Why?,b\n')
    found = [read(str(tmp_path / f"a.{kind}")) for kind in ("jsonl", "json", "csv")]
    for prompts in found:
        assert [p.conversation for p in prompts] == [p.conversation for p in found[0]]
        assert [p.given["id"] for p in prompts] == ["a", "b"]
    assert found[0][0].conversation.messages[0].context == "1, 2"


def test_several_turns_are_read_and_get_a_system_message(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (prompt,) = read(str(tmp_path / "a.jsonl"))
    assert [m.content for m in prompt.conversation.messages] == ["a", "b", "c"]
    ((first, *_),) = [
        p.conversation.messages
        for p in read_prompts((), str(tmp_path / "a.jsonl"), "Be brief.", False, io.StringIO())[0]
    ]
    assert (first.role, first.content) == ("system", "Be brief.")


def test_standard_input_is_one_question_or_rows_of_json() -> None:
    assert [p.question for p in read("-", stdin="one\ntwo\n")] == ["one\ntwo"]
    lines = '{"prompt": "one"}\n{"prompt": "two"}\n'
    assert [p.question for p in read("-", stdin=lines)] == ["one", "two"]


BAD_LINES = {
    "no JSON": ("{", "not JSON"),
    "a list": ("[1]", "expected an object with one of prompt, instruction, messages"),
    "nothing asked": (
        '{"id": 3}',
        "instruction, messages, and it has none of them",
    ),
    "two questions": ('{"prompt": "a", "instruction": "b"}', "it has prompt and instruction"),
    "a number": ('{"prompt": 5}', "its prompt is no text"),
    "spaces": ('{"prompt": "  "}', "its prompt is no text"),
    "no content": ('{"messages": [{"role": "user"}]}', "message 1 has no content"),
    "a role": (
        '{"messages": [{"role": "bot", "content": "x"}]}',
        "message 1 has no content, or",
    ),
    "no list": ('{"messages": "x"}', "message 1 has no content"),
    "ends": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "it ends with an answer, so there is nothing to ask",
    ),
    "order": (
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        "message 1 is from 'assistant', expected 'user'",
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_broken_line_is_told_by_its_number_or_left_out(tmp_path: Path, kind: str) -> None:
    line, sentence = BAD_LINES[kind]
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "good"}}\n{line}\n{{"prompt": "last"}}\n')
    with pytest.raises(DatasetFormatError) as caught:
        read(str(tmp_path / "a.jsonl"))
    assert "a.jsonl, line 2: " in str(caught.value)
    assert sentence in str(caught.value)
    prompts, skipped = read_prompts((), str(tmp_path / "a.jsonl"), None, True, io.StringIO())
    assert [(p.row, p.question) for p in prompts] == [(0, "good"), (2, "last")]
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.xlsx", "x", "is no .jsonl, .json, .csv or .txt file"),
        ("a.txt", "\n\n", "Nothing is asked"),
        ("a.json", "[1,", "not JSON"),
        ("missing.txt", None, "no file"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, name: str, content: str | bytes | None, sentence: str
) -> None:
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DatasetFormatError, match=sentence):
        read(str(tmp_path / name))
