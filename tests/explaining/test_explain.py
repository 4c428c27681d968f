"""`qlora-pl explain` says of a key what docs/configuration.md says, and where it acts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typed import type_words

from qlora_pl.commands import COMMANDS
from qlora_pl.errors import ConfigurationError
from qlora_pl.explaining import catalogue as kept
from qlora_pl.explaining.asking import answer
from qlora_pl.explaining.catalogue import Catalogue, load
from qlora_pl.explaining.flags import of_help
from qlora_pl.explaining.references import mentions, sections
from qlora_pl.explaining.units import PLAIN
from qlora_pl.explaining.wording import plain_text

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/configuration.md").read_text()

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # building the parser imports everything


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load()


def rows() -> list[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each row of the page; a source's keys below its own."""
    found = []
    for section in re.split(r"^##+ ", PAGE, flags=re.MULTILINE):
        prefix = "data.sources." if section.startswith("A source") else ""
        for row in re.findall(
            r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.*) \|$", section, re.MULTILINE
        ):
            found.append((prefix + row[0], *row[1:]))
    return found


def test_every_key_of_the_page_has_the_pages_text(catalogue: Catalogue) -> None:
    assert len(rows()) > 100
    for name, kind, default, meaning in rows():
        entry = catalogue.keys[name]
        assert (entry.kind, entry.default, entry.meaning) == (kind, default.strip("`"), meaning)
        text = " ".join(answer([name], catalogue)[0].split())
        assert " ".join(plain_text(meaning).split()) in text


def test_every_key_is_declared_where_it_says(catalogue: Catalogue) -> None:
    """The file is opened, and the line names the key."""
    num_lines = 0
    for entry in catalogue.keys.values():
        file, _, line = entry.place.partition(":")
        if file.startswith("qlora_pl/") and line:
            num_lines += 1
            declared = (ROOT / file).read_text().splitlines()[int(line) - 1]
            assert re.search(rf"\b{entry.name.rpartition('.')[2]}\b", declared), entry
        elif not entry.name.startswith("trainer."):
            assert entry.name in ("seed_everything", "ckpt_path"), entry
    assert num_lines > 100
    assert catalogue.keys["model.lora.r"].owner == "LoRAConfig"
    assert catalogue.keys["trainer.max_steps"].owner == "Trainer"


def test_keys_that_go_with_each_other_say_so_on_both_sides(catalogue: Catalogue) -> None:
    for entry in catalogue.keys.values():
        for other in catalogue.goes_with(entry.name):
            assert entry.name in catalogue.goes_with(other)
    assert "model.lora.r" in catalogue.goes_with("model.lora.alpha")  # its text: alpha / r
    assert "model.lora.alpha" in catalogue.goes_with("model.lora.r")  # by alpha's text alone
    assert "trainer.accumulate_grad_batches" in catalogue.goes_with("data.global_batch_size")
    assert "data.global_batch_size" in catalogue.goes_with("trainer.accumulate_grad_batches")
    assert "data.max_length" in catalogue.goes_with("data.packing")
    assert "samples.decoding.top_p" in catalogue.goes_with("samples.decoding.do_sample")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("as in `b_c`", ["a.b_c"]),
        ("with b_c above 1", ["a.b_c"]),
        ("see `x.y`; also x.y", ["x.y"]),
        ("the d of it", []),  # a word of prose
        ("the `d / e` of it", ["a.d"]),
        ("itself: `a.me`", []),
        ("the end of one: `z.w`", ["x.z.w"]),
    ],
)
def test_a_text_names_keys_between_backticks_or_by_words_that_prose_has_not(
    text: str, found: list[str]
) -> None:
    names = ["a.me", "a.b_c", "a.d", "x.y", "x.z.w", "b_c"]
    assert mentions("a.me", text, names) == found


PLAIN_NUMBERS = {
    "model.lora": {"r", "alpha"},
    "model.optimizer": {"lr", "betas", "eps"},
    "model.decoding": {"temperature", "length_penalty", "repetition_penalty"},
    "samples.decoding": {"temperature", "length_penalty", "repetition_penalty"},
}
"""Numbers of the project's own keys that count nothing, read by hand off docs/configuration.md."""


def test_every_number_of_the_projects_own_has_a_unit_or_is_a_plain_one(
    catalogue: Catalogue,
) -> None:
    plain: dict[str, set[str]] = {}
    for entry in catalogue.keys.values():
        is_number = "number" in entry.kind and not entry.kind.startswith("mapping")
        if not entry.name.startswith("trainer."):
            assert bool(entry.unit) == is_number, entry
        if entry.unit == PLAIN:
            group, _, leaf = entry.name.rpartition(".")
            plain.setdefault(group, set()).add(leaf)
    assert plain == PLAIN_NUMBERS


def test_units_are_what_docstrings_begin_with(catalogue: Catalogue) -> None:
    """Read by hand off docs/configuration.md."""
    share = "a share, from 0 to 1"
    for name, unit in {
        "data.max_length": "tokens",
        "data.max_target_length": "tokens",
        "data.tokens_per_batch": "tokens",
        "model.decoding.max_new_tokens": "tokens",
        "model.decoding.top_k": "tokens",
        "model.decoding.no_repeat_ngram_size": "tokens",
        "model.decoding.num_beams": "beams",
        "data.batch_size": "rows",
        "data.global_batch_size": "rows",
        "data.window": "rows",
        "data.max_train_samples": "rows",
        "data.max_val_samples": "rows",
        "data.sources.limit": "rows",
        "data.sources.sample": "rows",
        "samples.num_prompts": "rows",
        "data.val_size": "rows, or below 1 a share of them",
        "data.sources.weight": "times an epoch",
        "checkpoint.every_n_steps": "optimizer steps",
        "checkpoint.keep_every_n_steps": "optimizer steps",
        "samples.every_n_steps": "optimizer steps",
        "model.schedule.warmup_steps": "optimizer steps",
        "trainer.log_every_n_steps": "optimizer steps",
        "trainer.max_epochs": "epochs",
        "trainer.accumulate_grad_batches": "micro-batches",
        "trainer.num_sanity_val_steps": "batches",
        "checkpoint.keep_last": "checkpoints",
        "checkpoint.keep_best": "checkpoints",
        "data.num_workers": "processes",
        "data.encoding_processes": "processes",
        "run.timeout_seconds": "seconds",
        "run.memory_gib": "GiB",
        "model.quantization.block_size": "",  # a choice
        "model.lora.rank_pattern": "",
        "model.lora.dropout": share,
        "model.schedule.warmup_ratio": share,
        "model.optimizer.weight_decay": share,
        "data.max_lost_ratio": share,
        "model.decoding.top_p": share,
        "model.decoding.typical_p": share,
        "model.schedule.min_lr_ratio": "a ratio",
        "model.optimizer.lora_plus_ratio": "a ratio",
        "data.template": "",
        "data.val_seed": "none, any whole number from 0 on",
    }.items():
        assert catalogue.keys[name].unit == unit, name
    for flag, unit in {"--tokens": "tokens", "--time-limit": "seconds", "--offline": ""}.items():
        assert {e.unit for e in catalogue.flags if e.name == flag} == {unit}, flag


def test_every_page_that_is_named_has_the_heading_and_the_name(catalogue: Catalogue) -> None:
    for entry in [*catalogue.keys.values(), *catalogue.flags]:
        for place in entry.pages:
            page, _, heading = place.partition(", ")
            texts = dict(sections((ROOT / page).read_text()))
            assert entry.name.rpartition(".")[2] in texts[heading.strip('"')], (entry, place)
    assert (
        catalogue.keys["data.sources.limit"].pages[0].startswith('docs/configuration.md, "A source')
    )
    assert catalogue.keys["ckpt_path"].pages[0] == 'docs/configuration.md, "The run as a whole"'
    [threshold] = [f for f in catalogue.flags if (f.name, f.commands) == ("--threshold", ["merge"])]
    assert any(page.startswith("docs/merging.md") for page in threshold.pages)
    assert threshold.place == "qlora_pl/merging/merge.py"


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ("model.lora.r", "model.lora.r"),
        ("--model.lora.r", "model.lora.r"),
        ("lora.r", "model.lora.r"),
        ("r", "model.lora.r"),
        ("--model.lora.r=16", "model.lora.r"),
        ("target_modules+", "model.lora.target_modules"),
        ("trainer.strategy", "trainer.strategy"),
        ("packing", "data.packing"),
        ("sources.limit", "data.sources.limit"),
        ("data.val_sources.limit", "data.sources.limit"),
        ("data.sources[0].limit", "data.sources.limit"),
        ("data.packing:", "data.packing"),
    ],
)
def test_a_key_is_found_by_its_name_or_by_an_end_that_it_alone_has(
    asked: str, key: str, catalogue: Catalogue
) -> None:
    text, plain = answer([asked], catalogue)
    assert text.splitlines()[0] == plain["name"] == key


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["max_new_tokens"], "2 names (model.decoding.max_new_tokens, samples.decoding.max"),
        (["model.lora.rnk_pattern"], "did you mean model.lora.rank_pattern?"),
        (["lora.dropuot"], "did you mean model.lora.dropout?"),
        (["pakcing"], "did you mean data.packing"),
        (["qqqqqq"], "qlora-pl explain lists the groups"),
        (["merge", "--treshold"], "merge has no flag --treshold; did you mean --threshold"),
        (["merge", "--zzzzzz"], "merge has no flag --zzzzzz."),
        (["--tresholds"], " --threshold?"),
        (["mrege", "--threshold"], "no command is called 'mrege'; did you mean 'merge'?"),
        (["modle"], "or model?"),
        (["fit", "--data.batch_sise"], "did you mean data.batch_size?"),
        (["r", "alpha"], "one key at a time"),
    ],
)
def test_what_is_no_key_is_one_sentence_with_the_nearest(
    asked: list[str], says: str, catalogue: Catalogue
) -> None:
    with pytest.raises(ConfigurationError) as error:
        answer(asked, catalogue)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_groups_list_their_keys(catalogue: Catalogue) -> None:
    text, plain = answer(["model.lora"], catalogue)
    assert [key["name"] for key in plain["keys"]] == [
        name for name in catalogue.keys if name.startswith("model.lora.")
    ]
    assert "model.lora.rank_pattern" in text
    assert answer(["run.*"], catalogue) == answer(["run"], catalogue)
    assert answer(["data.sources.*"], catalogue)[1]["keys"][0]["name"] == "data.sources.path"
    assert answer(["data.sources"], catalogue)[1]["name"] == "data.sources"


def test_without_a_key_every_group_is_listed_and_every_key_is_in_one(
    catalogue: Catalogue,
) -> None:
    text, plain = answer([], catalogue)
    assert sum(group["keys"] for group in plain) == len(catalogue.keys)
    assert all(group["title"] for group in plain), plain
    assert all(f"  {group['group']}" in text for group in plain)


def test_every_command_and_every_flag_of_its_help_is_known(
    catalogue: Catalogue,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Against what ``--help`` of each command prints; that of a run's commands lists the keys."""
    commands = catalogue.commands()
    assert list(dict.fromkeys(command.split()[0] for command in commands)) == list(COMMANDS)
    for command in commands:
        flags = [flag for flag in catalogue.flags if command in flag.commands]
        if command in ("fit", "validate", "test", "predict"):
            assert [flag.name for flag in flags] == ["--config", "--print_config"]
            continue
        _, shown, _ = type_words(monkeypatch, capsys, *command.split(), "--help")
        listed = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, re.MULTILINE)) - {"--help"}
        assert {flag.name for flag in flags} == listed, command
        shown = _only_words(shown)
        for flag in flags:
            assert _only_words(flag.meaning) in shown, flag


def _only_words(text: str) -> str:
    """Without spaces, line ends and backticks; YAML's words for Python's."""
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = text.replace(python, yaml)
    return re.sub(r"[\s`]+|\\(?=\|)", "", text)


def test_flags_are_asked_for_with_their_command_or_without(catalogue: Catalogue) -> None:
    text, [plain] = answer(["merge", "--threshold"], catalogue)
    assert plain["commands"] == ["merge"]
    assert text in answer(["--threshold"], catalogue)[0]
    text, _ = answer(["inspect"], catalogue)
    assert all(f"qlora-pl inspect {what}:" in text for what in ("data", "model", "adapter"))
    assert answer(["inspect", "data", "--rows"], catalogue)[1][0]["commands"] == ["inspect data"]
    assert answer(["fit", "--data.packing"], catalogue) == answer(["data.packing"], catalogue)
    assert answer(["fit", "--print_config"], catalogue)[1][0]["name"] == "--print_config"
    [tokens] = answer(["inspect", "model", "--tokens"], catalogue)[1]
    assert (tokens["default"], tokens["kind"]) == ("512", "whole number")


def test_a_written_help_is_read_flag_by_flag() -> None:
    text = """usage: x

flags:
  --a FILE:ROW  one thing,
                and more of it; may be given several times
  --b N         None of that; default: 3
  --c           switch

--d  is no flag of it"""
    assert list(of_help(text)) == [
        ("--a", "`FILE:ROW`, may be given several times", "none", "one thing, and more of it"),
        ("--b", "whole number", "3", "null of that"),
        ("--c", "needs no value", "none", "switch"),
    ]


def test_a_mistake_in_a_key_points_to_a_group_that_is_explained(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = type_words(monkeypatch, capsys, "fit", "--model.lora.qqqqqq", "1")
    assert code == 2
    [told] = re.findall(r"; qlora-pl explain (\S+) lists them", err)
    assert answer([told], catalogue)[1]["group"] == "model.lora"


def test_without_the_libraries_of_a_run_one_sentence_says_so(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libgone.so is missing')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "qlora_pl", "explain", "r"],
        env=os.environ | {"PYTHONPATH": path, "QLORA_PL_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "(libgone.so is missing); qlora-pl doctor says" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_prints_text_or_json(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = type_words(monkeypatch, capsys, "explain", "lora.r")
    assert (code, out) == (0, answer(["model.lora.r"], catalogue)[0] + "\n")
    code, out, _ = type_words(monkeypatch, capsys, "explain", "lora.r", "--json")
    assert (code, json.loads(out)) == (0, answer(["model.lora.r"], catalogue)[1])
    code, out, err = type_words(monkeypatch, capsys, "explain", "lora.r", "--jsn")
    assert (code, out) == (2, "")
    assert "did you mean '--json'?" in err
    code, out, err = type_words(monkeypatch, capsys, "explain", "lora.rr")
    assert (code, out) == (2, "")
    assert "did you mean" in err


def test_a_second_call_imports_no_heavy_library(catalogue: Catalogue) -> None:
    code = (
        "import sys; sys.argv = ['qlora-pl', 'explain', 'r']\n"
        "from qlora_pl.__main__ import main\n"
        "assert main() == 0\n"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer(["r"], catalogue)[0] + "\n"


def test_the_catalogue_is_made_anew_when_the_code_or_a_library_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("A = 1")
    monkeypatch.setattr(kept, "PACKAGE", package)
    monkeypatch.setattr(kept, "DOCS", tmp_path / "docs")
    digests = [kept.digest(), kept.digest()]
    (package / "code.py").write_text("A = 2")
    digests.append(kept.digest())
    monkeypatch.setattr(kept, "LIBRARIES", ("pytest",))
    digests.append(kept.digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_damaged_copy_is_made_anew(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path))
    file = tmp_path / "keys" / f"{kept.digest()}.json"
    file.parent.mkdir()
    file.write_text('{"keys": [')
    assert load() == catalogue
    assert json.loads(file.read_text())["keys"]
