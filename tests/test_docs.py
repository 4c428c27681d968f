"""The documentation is true: its commands parse, its links lead somewhere, its code runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qlora_pl.cli import read_runs

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # code from the pages runs in this process


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_a_link_leads_to_a_file(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_a_file_that_is_named_exists(path: Path) -> None:
    for target in re.findall(
        r"`((?:tests|docs|configs|experiments|benchmarks)/[\w./-]+)`", path.read_text()
    ):
        assert (ROOT / target).exists(), f"{path.name}: {target}"


def test_the_architecture_names_every_file_of_the_package() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"^ +(\w+\.py) ", text, re.MULTILINE))
    files = {file.name for file in (ROOT / "qlora_pl").rglob("*.py")} - {"__init__.py"}
    assert named == files


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        assert set(re.findall(r"(?<!\w)make ([a-z-]+)(?=[\s`])", path.read_text())) <= targets | {
            "help"
        }


def commands() -> list[str]:
    found = []
    for path in PAGES:
        found += re.findall(r"^ *(qlora-pl fit .*)$", path.read_text(), re.MULTILINE)
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_a_fit_command_of_the_pages_parses(
    command: str,
    tmp_path: Path,
    tiny_base: Path,
    rows_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Paths that a reader brings are replaced; every key and file of the project is real."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("qlora_pl.run_checks.locate_base", lambda *_: tiny_base)
    words = shlex.split(command)[2:]
    words = ["experiments/quickstart.yaml" if word == "my.yaml" else word for word in words]
    words = [str(rows_file) if word == "rows.jsonl" else word for word in words]
    if words[0] not in ("--help", "--print_config"):
        assert len(read_runs([words])) == 1


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_the_ten_lines_of_python_train_and_their_adapter_loads_with_plain_peft(
    tmp_path: Path, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's two Python blocks, on a tiny base."""
    monkeypatch.chdir(tmp_path)
    load, train = blocks("README.md")
    train = train.replace(".cache/quickstart/SmolLM2-135M-Instruct", str(tiny_base))
    train = train.replace("experiments/quickstart/train.jsonl", str(rows_file))
    train = train.replace("val_size=20", "val_size=2").replace("max_steps=10", "max_steps=2")
    assert sum(bool(line.strip()) for line in train.splitlines()) <= 13
    exec(train, {})
    load = load.replace("runs/quickstart/version_0/adapter", "runs/from-python/adapter")
    scope: dict = {}
    exec(load, scope)
    assert any("lora_B" in name for name, p in scope["model"].named_parameters() if p.any())
