"""``qlora-pl generate`` as users type it: answers to standard output, mistakes in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import warm
from trained import Type

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process

SHORT = ("--max-new-tokens", "6")


def test_nothing_but_answers_goes_to_standard_output(type_in: Type, adapter: Path) -> None:
    code, out, _ = type_in("generate", "--adapter", adapter, "--prompt", "How many legs?", *SHORT)
    assert code == 0
    first = out
    words = ("--prompt", "How many legs?", "--prompt", "Why?", *SHORT)
    code, out, _ = type_in("generate", "--adapter", adapter, *words)
    assert out.startswith(first.rstrip("\n"))
    assert out.count("\n\n") >= 1


def test_lines_of_json_hold_what_there_is_to_know(
    type_in: Type, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text('{"instruction": "How many legs?", "id": "x1"}\n')
    words = ("--prompts", tmp_path / "q.jsonl", "--format", "jsonl", "--compare", *SHORT)
    code, out, _ = type_in("generate", "--adapter", adapter, *words)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["adapter"] for row in rows] == ["adapter", "base"]
    for row in rows:
        assert row["id"] == "x1"
        assert row["instruction"] == "How many legs?"
        assert row["prompt"] == "### Human: How many legs?### Assistant:"
        assert row["stop_reason"] in ("stop_token", "length")
        assert row["answer_tokens"] <= 6
        assert row["seconds"] > 0


def test_names_stand_before_answers_of_several(type_in: Type, adapter: Path) -> None:
    words = ("--prompt", "Why?", "--compare", "--with-prompt", *SHORT)
    _, out, _ = type_in("generate", "--adapter", adapter, *words)
    assert "[with the adapter]\n### Human: Why?### Assistant:\n" in out
    assert "[the base alone]\n" in out


def test_a_model_alone_answers(type_in: Type, tiny_base: Path) -> None:
    words = ("--quantization", "nf4", "--template", "guanaco", "--prompt", "Why?", *SHORT)
    code, _, said = type_in("generate", "--model", tiny_base, *words)
    assert code == 0
    assert "assumed" not in said
    code, _, said = type_in("generate", "--model", tiny_base, "--prompt", "Why?", *SHORT)
    assert code == 0


def test_flags_may_be_written_with_underscores_and_values(type_in: Type, adapter: Path) -> None:
    plain = type_in("generate", "--adapter", adapter, "--prompt", "Why?", "--max-new-tokens=4")
    other = type_in(
        "generate", f"--adapter={adapter}", "--prompt=Why?", "--max_new_tokens", "4", "--raw=false"
    )
    assert plain[:2] == other[:2]


# -- files -----------------------------------------------------------------------------------------


def questions(folder: Path, number: int = 12) -> Path:
    path = folder / "q.txt"
    path.write_text("".join(f"How many legs has animal {n}?\n" for n in range(number)))
    return path


def test_a_file_is_gone_on_with_where_a_kill_left_it(
    type_in: Type, adapter: Path, tmp_path: Path
) -> None:
    words = ("generate", "--adapter", adapter, "--prompts", questions(tmp_path), *SHORT)
    words = (*words, "--do-sample", "--seed", "5", "--batch-size", "4")
    assert type_in(*words, "--output", "whole.jsonl")[0] == 0
    whole = Path("whole.jsonl").read_text().splitlines(keepends=True)
    assert len(whole) == 12
    Path("cut.jsonl").write_text("".join(whole[:5]) + whole[5][:30])
    code, out, said = type_in(*words, "--output", "cut.jsonl")
    assert (code, out) == (0, "")
    assert "5 of 12 are answered already." in said

    def plain(lines: list[str]) -> list[dict[str, Any]]:
        return [{**json.loads(line), "seconds": 0} for line in lines]

    assert plain(Path("cut.jsonl").read_text().splitlines()) == plain(whole)
    before = Path("cut.jsonl").read_bytes()
    assert type_in(*words, "--output", "cut.jsonl")[0] == 0
    assert Path("cut.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("--temperature", "0.5", "--do-sample"), "was made with other settings"),
        (("--system", "Be brief."), "was made with other settings"),
    ],
)
def test_a_file_of_other_settings_is_left_alone(
    type_in: Type, adapter: Path, tmp_path: Path, change: tuple[str, ...], sentence: str
) -> None:
    words = ("generate", "--adapter", adapter, "--prompts", questions(tmp_path, 2), *SHORT)
    assert type_in(*words, "--output", "a.jsonl")[0] == 0
    before = Path("a.jsonl").read_bytes()
    code, _, said = type_in(*words, *change, "--output", "a.jsonl")
    assert code == 2
    assert "other settings" in said
    assert Path("a.jsonl").read_bytes() == before


def test_a_file_of_other_questions_or_of_something_else_is_left_alone(
    type_in: Type, adapter: Path, tmp_path: Path
) -> None:
    words = ("generate", "--adapter", adapter, *SHORT, "--output", "a.jsonl")
    assert type_in(*words, "--prompt", "one")[0] == 0
    code, _, said = type_in(*words, "--prompt", "two")
    assert code == 2
    assert "answers another question than --prompt 1" in said
    Path("a.jsonl").write_text("mine\n")
    code, _, said = type_in(*words, "--prompt", "one")
    assert code == 2
    assert "'a.jsonl', line 1, holds no answer of this command" in said
    assert Path("a.jsonl").read_text() == "mine\n"


def test_a_reader_that_has_seen_enough_ends_it_quietly(adapter: Path, tmp_path: Path) -> None:
    words = ["generate", "--adapter", str(adapter), "--prompts", str(questions(tmp_path, 40))]
    with warm.Started("qlora_pl", *words, *SHORT, "--batch-size", "1") as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(120) == 0
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


# -- mistakes --------------------------------------------------------------------------------------

ASK = ("--adapter", "ADAPTER", "--prompt", "x")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing named": (("--prompt", "x"), "--adapter: name an adapter folder, or a model alone"),
    "both named": ((*ASK, "--model", "BASE"), "--adapter: name an adapter folder, or a model"),
    "misspelt flag": ((*ASK, "--temprature", "1"), "no flag is called --temprature; did you mean"),
    "abbreviated flag": ((*ASK, "--temp", "1"), "no flag is called --temp"),
    "stray word": ((*ASK, "y"), "'y' belongs to no flag"),
    "lacking value": (("--adapter",), "--adapter: expected one argument."),
    "no number": ((*ASK, "--top-k", "many"), "--top-k: invalid int value: 'many'."),
    "no folder": (("--adapter", "./nowhere", "--prompt", "x"), "no folder './nowhere'."),
    "no adapter": (
        ("--adapter", "BASE", "--prompt", "x"),
        "there is no adapter_c",
    ),
    "run folder": (("--adapter", "RUN", "--prompt", "x"), "did you mean 'RUN/adapter"),
    "adapter as model": (("--model", "ADAPTER", "--prompt", "x"), "is an adapter; name it with"),
    "no model": (("--model", "./nowhere", "--prompt", "x"), "no folder './nowhere'"),
    "unknown template": ((*ASK, "--template", "alpca"), "did you mean 'alpaca'?"),
    "lacking template file": ((*ASK, "--template", "x.jinja"), "'x.jinja' cannot be read"),
    "template of other tokens": ((*ASK, "--template", "llama3"), "which is no token of"),
    "temperature 0": ((*ASK, "--do-sample", "--temperature", "0"), "temperature: must be above 0"),
    "top-p 0": ((*ASK, "--do-sample", "--top-p", "0"), "top_p: must lie above 0, up to 1"),
    "without sampling": ((*ASK, "--top-p", "0.5"), "have no effect with do_sample: false"),
    "no beams": ((*ASK, "--length-penalty", "2"), "have no effect without num_beams above 1"),
    "beam groups": ((*ASK, "--num-beam-groups", "2"), "left transformers"),
    "contrastive": ((*ASK, "--penalty-alpha", "0.6"), "left transformers"),
    "other quantisation": ((*ASK, "--quantization", "fp4"), "was trained over nf4, not fp4"),
    "two precisions": (
        ("--model", "BASE", "--prompt", "x", "--quantization", "nf4", "--precision", "float32"),
        "contradict each other",
    ),
    "unknown precision": ((*ASK, "--precision", "int3"), "--precision: invalid choice: 'int3'"),
    "base of another": ((*ASK, "--base", "OTHER"), "was trained over other weights"),
    "base for a model": (
        ("--model", "BASE", "--base", "BASE", "--prompt", "x"),
        "--base: is for",
    ),
    "no prompt file": (
        ("--adapter", "ADAPTER", "--prompts", "no.txt"),
        "no file 'no.txt'",
    ),
    "file of another kind": (("--adapter", "ADAPTER", "--prompts", "a.pdf"), "is no .jsonl"),
    "long prompt": (("--adapter", "ADAPTER", "--prompt", "long " * 300), "tokens, and prompt and"),
    "output folder": ((*ASK, "--output", "."), "--output: '.' is a folder"),
    "output nowhere": ((*ASK, "--output", "no/where.jsonl"), "lies in none; name a file"),
    "batch of none": ((*ASK, "--batch-size", "0"), "--batch-size: must be at least 1, got 0."),
    "no adapter to leave out": (
        ("--model", "BASE", "--prompt", "x", "--no-adapter"),
        "--no-adapter: there is no adapter",
    ),
    "two of a name": (("--adapter", "ADAPTER", "--adapter", "ADAPTER"), "two are called 'adapter'"),
    "the base's name": (("--adapter", "base=ADAPTER", "--prompt", "x"), "'base' is the base's own"),
    "contradiction": ((*ASK, "--no-adapter", "--compare"), "leave --no-adapter out"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    type_in: Type, adapter: Path, tiny_base: Path, other_base: Path, kind: str
) -> None:
    words, sentence = MISTAKES[kind]
    places = {"ADAPTER": adapter, "BASE": tiny_base, "OTHER": other_base, "RUN": adapter.parent}
    for word, path in places.items():
        words = tuple(w.replace(word, str(path)) for w in words)
        sentence = sentence.replace(word, str(path))
    code, out, said = type_in("generate", *words)
    assert code == 2, said
    assert out == ""
    assert "Traceback" not in said
    sentences = [line for line in said.splitlines() if line.startswith("qlora-pl: ")]
    assert len(sentences) == 1, said
    assert sentence in sentences[0]


def test_a_broken_line_may_be_left_out(type_in: Type, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "one"}\n{\n{"prompt": "three"}\n')
    words = ("generate", "--adapter", adapter, "--prompts", path, "--format", "jsonl", *SHORT)
    assert type_in(*words)[0] == 2
    code, out, said = type_in(*words, "--on-error", "skip")
    assert code == 0
    assert [json.loads(line)["row"] for line in out.splitlines()] == [0, 2]
    assert "line 2: not JSON" in said


def test_a_damaged_folder_is_refused_before_anything_is_loaded(
    type_in: Type, adapter: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    data = bytearray((copy / "adapter_model.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(data)
    code, _, said = type_in("generate", "--adapter", copy, "--prompt", "x")
    assert code == 2
    assert "was altered since it was written" in said
