"""docs/memory.md says what the plan says: its tables are made again and compared."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typed import type_words

from qlora_pl.planning.reports.figures import figure6_table

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "memory.md").read_text()
TABLE = [line for line in PAGE.splitlines() if re.match(r"\| `\w+` \| r \d+", line)]


def test_the_figures_table_is_the_plans() -> None:
    printed = [line.split() for line in figure6_table().splitlines()[1:5]]
    shown = [line.split() for line in PAGE.splitlines() if line.startswith("    LLaMA ")]
    assert shown == printed


def test_the_measured_errors_are_those_of_the_committed_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    results = max(ROOT.glob("benchmarks/results/memory-plan-cpu-*.json"))
    made = importlib.import_module("memory_plan").summary(json.loads(results.read_text())["cases"])
    assert made in " ".join(PAGE.split())
    assert f"`benchmarks/results/{results.name}`" in PAGE


def test_every_experiment_has_its_line() -> None:
    names = {re.match(r"\| `(\w+)`", line)[1] for line in TABLE}  # type: ignore[index]
    assert names == {path.stem for path in (ROOT / "experiments").glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
def test_the_lines_of_the_experiments_are_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plans: Any = importlib.import_module("plans")
    made = [plans.row(plans.planned(path)) for path in sorted(ROOT.glob("experiments/*.yaml"))]
    assert made == TABLE


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "command",
    [
        line.strip()
        for line in PAGE.splitlines()
        if line.startswith("    qlora-pl plan --shape") and "--plot" not in line
    ],
)
def test_a_command_of_the_page_runs(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, out, err = type_words(monkeypatch, capsys, *command.split()[1:])
    assert code == 0, err
    assert out
