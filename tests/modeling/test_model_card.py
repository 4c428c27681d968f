"""A model card says what was trained on what, and its lines run as they stand."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapter_runs import Killed, fit, make_data, make_module
from cards import blocks
from conftest import save_base
from families import Saver
from huggingface_hub import ModelCard
from plain_peft import undo_replacements
from typed import type_words

from qlora_pl.modeling.folders.adapter_folder import read_adapter_folder
from qlora_pl.modeling.folders.card_sections import MOST_ROWS, chosen
from qlora_pl.modeling.folders.licences import base_licence
from qlora_pl.training.run_folders.card_facts import _sources, lasting_facts
from qlora_pl.training.watching.monitoring import RunMetrics

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

SETTINGS = {
    "seed_everything": 3,
    "trainer": {"max_steps": 3},
    "model": {"optimizer": {"name": "paged_adamw_32bit", "lr": 0.01}, "cache_dir": "/my/place"},
    "data": {"max_length": 48, "sources": [{"path": "/my/place/rows.jsonl"}]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("bases") / "tiny-llama")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A base\n")
    return folder


def run(folder: Path, base: Path, rows: Path, kill_at: int | None = None) -> Path:
    """A run with metrics and a configuration, up to a kill; its adapter folder."""
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    fit(folder, base, rows, RunMetrics(), kill_at=kill_at, r=8, alpha=64.0)
    return folder / "adapter"


@pytest.fixture(scope="module")
def adapter(base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("run"), base, rows_file)


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_a_hub_reads_its_opening(adapter: Path) -> None:
    data = ModelCard(card(adapter)).data.to_dict()
    assert data == {
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "qlora-pl"],
    }


def test_what_it_is_made_of_is_said_and_what_nobody_knows_is_unknown(adapter: Path) -> None:
    text = card(adapter)
    assert "| base | `tiny-llama` | apache-2.0, as its README says |" in text
    assert "| training rows | `rows.jsonl` | unknown |" in text
    assert "What is unknown was not said by any file of this run" in text


def test_settings_and_losses_are_those_of_the_run(adapter: Path) -> None:
    text = card(adapter)
    assert "| `model.optimizer.lr` | `0.01` |" in text
    assert "| `data.max_length` | `48` |" in text
    with (adapter.parent / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    history = read_adapter_folder(adapter).card["history"]
    logged = {int(row["step"]): row["train/loss"] for row in rows if row["train/loss"]}
    assert logged
    known = {row["step"]: row.get("train/loss") for row in history}
    for step, loss in logged.items():
        assert known[step] == float(loss)
    last = history[-1]
    assert f"| {last['step']} | {last['train/loss']:.4g} | {last['val/loss']:.4g} |" in text


def test_it_holds_no_place_on_the_machine(adapter: Path, base: Path, tmp_path: Path) -> None:
    text = card(adapter)
    assert str(base) not in text
    assert "/my/place" not in text
    assert str(tmp_path.parent) not in text


def test_a_resumed_run_writes_the_same_card(
    base: Path, rows_file: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "killed", base, rows_file, kill_at=2)
    again = run(tmp_path / "killed", base, rows_file)
    assert "## Curves" in card(again)
    assert card(again) == card(adapter)
    first, second = (read_adapter_folder(folder).card for folder in (adapter, again))
    assert json.dumps(first) == json.dumps(second)


def test_its_lines_run_as_they_stand(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(adapter)
    loading, asking, own = blocks(adapter, "python")
    scope: dict[str, Any] = {}
    exec(f"{loading}\n{asking}", scope)
    plain = capsys.readouterr().out
    exec(own, {})
    ours = capsys.readouterr().out
    (command,) = blocks(adapter, "bash")
    code, typed, said = type_words(monkeypatch, capsys, *shlex.split(command)[1:])
    assert code == 0, said
    assert plain.strip()
    assert typed == ours
    # bfloat16 of other kernels may part later; the project's answers are stripped
    assert ours.strip()[:6] == plain.strip()[:6]


@pytest.mark.slow
def test_its_lines_run_in_a_fresh_process(adapter: Path) -> None:
    loading, asking, own = blocks(adapter, "python")
    (command,) = blocks(adapter, "bash")
    words = [sys.executable, "-m", "qlora_pl", *shlex.split(command)[1:]]
    root = str(Path(__file__).parents[2])
    for call in (
        [sys.executable, "-c", f"{loading}\n{asking}"],
        [sys.executable, "-c", own],
        words,
    ):
        done = subprocess.run(
            call,
            cwd=adapter,
            env=os.environ | {"PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["T5", "GPT-2", "Falcon (rotary)", "BLOOM"])
def test_its_lines_run_for_other_families(
    family: str,
    saved: Saver,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = run(tmp_path, saved(family), rows_file)
    monkeypatch.chdir(adapter)
    scope: dict[str, Any] = {}
    try:
        exec("\n".join(blocks(adapter, "python")), scope)
    finally:
        undo_replacements()
    assert len(scope["answer"])


def test_a_hub_dataset_has_the_licence_that_its_authors_published() -> None:
    data = make_data([{"dataset": "dolly"}, {"path": "somebody/rows"}])  # type: ignore[arg-type]
    found = {source["name"]: source["licence"] for source in _sources(data)}
    assert found == {"databricks/databricks-dolly-15k": "CC BY-SA 3.0", "somebody/rows": None}


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("# No opening\n", {}),
        ("---\nlicense: [mit, {]\n---\n", {}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlicense: 'mit | `rm`'\n---\n", {}),
        (f"---\nlicense: {'x' * 999}\n---\n", {}),
        (None, {}),
    ],
)
def test_a_licence_is_read_and_never_guessed(
    readme: str | None, licence: dict[str, str], tmp_path: Path
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert base_licence(tmp_path) == licence


def test_a_table_of_losses_stays_short() -> None:
    rows = [{"step": n, "train/loss": 1.0} for n in range(1000)]
    shown = chosen(rows)
    assert len(shown) == MOST_ROWS
    assert (shown[0]["step"], shown[-1]["step"]) == (0, 999)
    validated = [{**row, "val/loss": 1.0} if row["step"] % 100 == 0 else row for row in rows]
    assert [row["step"] for row in chosen(validated)] == list(range(0, 1000, 100))


def test_a_template_that_writes_the_date_gives_no_example(base: Path, rows_file: Path) -> None:
    """It would be another page tomorrow."""
    data = make_data(rows_file)
    module = make_module(base)
    module.identity = type("Identity", (), {"folder": base})()

    class Dated:
        def definition(self) -> dict[str, str]:
            return {"jinja": "{{ strftime_now('%d') }}{{ messages[0]['content'] }}"}

    data.encoder = Dated()  # type: ignore[assignment]
    data.describe = lambda: {"global_batch_size": 2}  # type: ignore[method-assign]
    facts = lasting_facts(module, data, "# nothing\n")
    assert facts["prompt"] is None
    assert facts["settings"] == {}  # no configuration says any
