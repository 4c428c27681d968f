"""``qlora-pl inspect data`` as it is typed: what it writes, says and refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROWS
from looking import Looker, run_words

from qlora_pl.cli import read_runs
from qlora_pl.inspection.command import DEFAULT_OUTPUT, SIGNATURE, _parse

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process

ROOT = Path(__file__).parents[2]


@pytest.fixture
def look(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Looker:
    """Types in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Looker(tiny_base, monkeypatch, capsys)


def test_a_good_run_is_summed_up_and_gets_a_page(look: Looker, rows_file: Path) -> None:
    code, out, errors = look(*run_words(rows_file))
    assert (code, errors) == (0, [])
    page = Path(DEFAULT_OUTPUT).read_text("utf-8")
    assert SIGNATURE in page[:1024]
    assert f"{len(ROWS)} rows" in out
    assert out.splitlines()[-1] == f"inspect: {DEFAULT_OUTPUT}"
    assert not [name for name in Path().iterdir() if name.name != DEFAULT_OUTPUT]  # no run folder


def test_json_holds_the_numbers_and_nothing_else(look: Looker, rows_file: Path) -> None:
    code, out, _ = look(
        *run_words(rows_file, "--json", "--data.val_size", "3", "--output", "x.html")
    )
    numbers = json.loads(out)
    assert code == 0
    assert numbers["splits"]["train"]["num_rows"] == len(ROWS) - 3
    assert numbers["splits"]["val"]["num_rows"] == 3
    assert Path("x.html").exists()


def test_no_weight_is_there_to_be_read(look: Looker, rows_file: Path, tiny_base: Path) -> None:
    """The same base without its weights does just as well."""
    without = Path("without")
    shutil.copytree(tiny_base, without, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(without.glob("*.safetensors"))
    assert look(*run_words(rows_file), base=without.absolute())[0] == 0


def test_neither_peft_nor_bitsandbytes_is_imported(tiny_base: Path, rows_file: Path) -> None:
    typed = [
        word.replace("BASE", str(tiny_base)) for word in run_words(rows_file, "--output", "p.html")
    ]
    code = (
        f"import sys; sys.argv = ['qlora-pl', 'inspect', *{typed!r}]\n"
        "from qlora_pl.__main__ import main; assert main() == 0\n"
        "assert not {'peft', 'bitsandbytes'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=rows_file.parent
    )
    assert done.returncode == 0, done.stderr


def test_the_quickstart_is_without_fault(
    look: Looker, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are 240 and 40 lines; the tiny tokenizer needs more room than the file's."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("qlora_pl.run_checks.locate_base", lambda *_: tiny_base)
    config = ("data", "--config", "experiments/quickstart.yaml", "--data.max_length", "1024")
    output = tmp_path / "page.html"
    tokenizer = ("--data.tokenizer", str(tiny_base), "--model.model_name_or_path", "BASE")
    code, out, errors = look(*config, *tokenizer, "--output", str(output), "--json")
    assert (code, errors) == (0, [])
    numbers = json.loads(out)
    assert [numbers["splits"][name]["num_rows"] for name in ("train", "val")] == [240, 40]
    assert numbers["exact"]["num_rows"] == numbers["overlap"]["num_same_row"] == 0


BAD_WORDS: dict[str, tuple[tuple[str, ...], str]] = {
    "subject": (
        ("dta",),
        "inspect: nothing is called 'dta' (there is data, model, adapter); did you mean 'data'?",
    ),
    "own flag": (
        ("data", "--ouput", "x"),
        "inspect: no flag is called '--ouput'; did you mean '--output'?",
    ),
    "key": (("data", "--data.max_lenght", "8"), "'data' has no key 'max_lenght'; did you mean"),
    "config": (("data", "--config", "no.yaml"), "--config: no file 'no.yaml'."),
    "row": (
        ("data", "--row", "five"),
        "--row: expected FILE:ROW, rows counted from 1, got 'five'.",
    ),
    "row zero": (("data", "--row", "x:0"), "--row: expected FILE:ROW, rows counted from 1, got"),
    "rows": (("data", "--rows", "0"), "--rows: must be at least 1, got 0."),
    "rows text": (("data", "--rows", "x"), "inspect: --rows: invalid int value: 'x'."),
    "value": (("data", "--output"), "inspect: --output: expected one argument."),
    "folder": (("data", "--output", "no/page.html"), "--output: no folder 'no'; make it first."),
    "output": (("data", "--output", "."), "--output: '.' is a folder; name a file in it."),
    "base": (("data", "--data.sources", "rows.jsonl"), "model.model_name_or_path: must be set"),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_a_mistake_is_one_sentence_and_exit_code_2(name: str, look: Looker) -> None:
    typed, sentence = BAD_WORDS[name]
    code, out, errors = look(*typed)
    assert code == 2
    assert out == ""
    assert errors[0].startswith(f"qlora-pl: {sentence}")
    assert not any("Traceback" in line for line in errors)
    assert not list(Path().glob("*.html"))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("99", "has no row 99 that is trained or validated on (the last such is row 22)."),
        ("other.jsonl:1", "--row: no rows were read from 'other.jsonl'"),
    ],
)
def test_a_row_that_is_not_there_is_said_so(
    row: str, sentence: str, look: Looker, rows_file: Path
) -> None:
    code, _, errors = look(*run_words(rows_file, "--row", row))
    assert code == 2
    assert sentence in errors[0]


def test_a_page_is_replaced_and_nothing_else_ever_is(look: Looker, rows_file: Path) -> None:
    Path(DEFAULT_OUTPUT).write_text("notes of mine")
    code, _, errors = look(*run_words(rows_file))
    assert code == 2
    assert errors == [
        f"qlora-pl: --output: '{DEFAULT_OUTPUT}' exists and is no page of this command; name "
        "another file."
    ]
    assert Path(DEFAULT_OUTPUT).read_text() == "notes of mine"
    Path(DEFAULT_OUTPUT).write_text(f"<head>{SIGNATURE}")
    assert look(*run_words(rows_file))[0] == 0
    assert "</html>" in Path(DEFAULT_OUTPUT).read_text("utf-8")


def test_help_says_what_the_flags_do(look: Looker) -> None:
    code, out, _ = look("data", "--help")
    assert code == 0
    assert all(flag in out for flag in ("--output", "--row", "--rows", "--json"))


def test_the_flags_of_a_run_pass_through_as_they_were_typed() -> None:
    typed = ["--trainer.max_steps", "-1", "--output=p.html", "--data.sources", "[a, b]", "--json"]
    options, rest = _parse(typed)
    assert rest == ["--trainer.max_steps", "-1", "--data.sources", "[a, b]"]
    assert (options.output, options.json) == ("p.html", True)


def test_no_key_of_a_run_is_taken_for_a_misspelt_flag(tiny_base: Path, rows_file: Path) -> None:
    (run,) = read_runs(
        [["--model.model_name_or_path", str(tiny_base), "--data.sources", str(rows_file)]]
    )
    for name in vars(run):
        assert _parse([f"--{name}", "x"])[1] == [f"--{name}", "x"]


# -- rows that fit would refuse --------------------------------------------------------------------

GOOD = {"prompt": "How many legs?", "response": "Eight of them, as always."}
REFUSED: dict[str, tuple[list[dict], tuple[str, ...], str]] = {
    "budget": (
        [{"prompt": "Q?", "response": "A long answer. " * 40}, GOOD],
        ("--data.max_length", "64", "--data.val_size", "0"),
        "data.max_length 64 takes away",
    ),
    "nothing fits": (
        [GOOD, GOOD],
        ("--data.max_length", "4"),
        "nothing to train on, no answer fits into data.max_length 4",
    ),
    "a bad row": (
        [GOOD, {"prompt": "Q?", "response": ""}, GOOD | {"prompt": "And then?"}],
        ("--data.val_size", "0"),
        "row 2: its answer (message 2) is empty.",
    ),
    "overlong is an error": (
        [GOOD, {"prompt": "Q?", "response": "A long answer. " * 40}],
        ("--data.overlong", "error", "--data.max_length", "64", "--data.val_size", "0"),
        "tokens, more than data.max_length 64",
    ),
    "nothing is left to train on": (
        [GOOD, GOOD | {"prompt": "And then?"}],
        ("--data.val_size", "2"),
        "data.val_size: 2 leaves none of the 2 rows to train on.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fit_would_refuse_is_exit_code_2_with_a_page(
    name: str, look: Looker, tmp_path: Path
) -> None:
    rows, more, sentence = REFUSED[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, errors = look(*run_words(path, *more))
    assert code == 2
    assert sentence in errors[0]
    assert errors[-1] == f"qlora-pl: The page about these rows is '{DEFAULT_OUTPUT}'."
    page = Path(DEFAULT_OUTPUT).read_text("utf-8")
    assert "fit would not start." in page
    assert "Eight" in page or "Q?" in page


def test_where_no_row_can_be_read_there_is_no_page(look: Looker, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"nothing": "of use"}\n')
    code, _, errors = look(*run_words(path))
    assert code == 2
    assert len(errors) == 1
    assert not Path(DEFAULT_OUTPUT).exists()
