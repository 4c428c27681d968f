"""ablation/grid: what a grid file means, and every way in which it can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_pl.ablation.command import ablate_command
from qlora_pl.ablation.grid.cells import Grid, label_of, make_grid
from qlora_pl.ablation.grid.grid_file import GridFile, read_grid
from qlora_pl.errors import ConfigurationError

HEAD = "question: Does it matter?\nbase: base.yaml\n"
AXES = """axes:
  rank: {key: model.lora.r, values: [8, 64], ordered: true}
  type: {key: model.quantization.quant_type, values: [nf4, fp4, none]}
"""


def grid_of(text: str, folder: Path) -> Grid:
    path = folder / "grid.yaml"
    path.write_text(text)
    return make_grid(read_grid(path))


def problems_of(text: str, folder: Path) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        grid_of(text, folder)
    return caught.value.problems


def test_cells_are_all_combinations_and_their_names_say_what_varies(tmp_path: Path) -> None:
    grid = grid_of(HEAD + AXES, tmp_path)
    names = [cell.name for cell in grid.cells]
    assert names[:3] == ["rank8-nf4", "rank8-fp4", "rank8-typenone"]
    assert len(names) == 6
    assert grid.cells[0].settings == {"model.lora.r": 8, "model.quantization.quant_type": "nf4"}


def test_linked_keys_move_together(tmp_path: Path) -> None:
    text = """axes:
  size:
    levels:
      small: {model.lora.r: 8, model.lora.alpha: 8}
      large: {model.lora.r: 64, model.lora.alpha: 64}
"""
    grid = grid_of(HEAD + text, tmp_path)
    assert [cell.name for cell in grid.cells] == ["small", "large"]
    assert grid.cells[1].settings == {"model.lora.r": 64, "model.lora.alpha": 64}


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("{first: 8, last: 64, factor: 2}", [8, 16, 32, 64]),
        ("{first: 1e-4, last: 1e-2, factor: 10}", [1e-4, 1e-3, 1e-2]),
        ("{first: 0.0, last: 0.1, step: 0.05}", [0.0, 0.05, 0.1]),
        ("{first: 3, last: 1, step: -1}", [3, 2, 1]),
        ("{first: 64, last: 10, factor: 0.5}", [64, 32, 16]),
    ],
)
def test_ranges(tmp_path: Path, written: str, values: list[float]) -> None:
    grid = grid_of(HEAD + f"axes:\n  x: {{key: model.lora.alpha, values: {written}}}\n", tmp_path)
    assert [cell.settings["model.lora.alpha"] for cell in grid.cells] == pytest.approx(values)


def test_what_all_cells_set_is_overruled_by_overrides_of_some(tmp_path: Path) -> None:
    text = AXES + "set: {model.optimizer.lr: 2e-4}\n"
    text += "overrides: [{when: {rank: 64, type: [nf4, fp4]}, set: {model.optimizer.lr: 1e-4}}]\n"
    rates = {c.name: c.settings["model.optimizer.lr"] for c in grid_of(HEAD + text, tmp_path).cells}
    assert rates["rank8-nf4"] == rates["rank64-typenone"] == 2e-4  # a number, not text
    assert rates["rank64-nf4"] == rates["rank64-fp4"] == 1e-4


def test_excluded_cells_are_not_there(tmp_path: Path) -> None:
    grid = grid_of(HEAD + AXES + "exclude: [{rank: 64, type: none}]\n", tmp_path)
    assert len(grid.cells) == 5
    assert "rank64-typenone" not in [cell.name for cell in grid.cells]


def test_the_reference_is_compared_with_every_other_cell(tmp_path: Path) -> None:
    text = AXES + "comparisons: {reference: {rank: 64, type: nf4}}\n"
    grid = grid_of(HEAD + text, tmp_path)
    assert len(grid.pairs) == 5
    assert {reference for _, reference in grid.pairs} == {"rank64-nf4"}


def test_all_pairs_are_each_compared_once(tmp_path: Path) -> None:
    grid = grid_of(HEAD + AXES + "comparisons: {all_pairs: true}\n", tmp_path)
    assert len(grid.pairs) == len({frozenset(pair) for pair in grid.pairs}) == 15


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AXES + "seed: [0]\n", "seed: no such key; did you mean 'seeds'?"),
        (AXES + "seeds: [0, 0]\n", "seeds: 0 stands twice."),
        (AXES + "seeds: []\n", "seeds: a run needs a seed; write [0]."),
        (AXES + "seeds: [a]\n", "seeds[0]: expected a whole number, got 'a'."),
        (AXES + "level: 95\n", "level: must lie in 0.5 to 1, without 1, got 95."),
        (AXES + "metric: {better: more}\n", "metric.better: expected 'lower' or 'higher'"),
        (AXES + "budget: {runs: 0}\n", "budget.runs: must be above 0, got 0."),
        ("axes: {x: {key: a}}\n", "axes.x: give key and values, or levels."),
        ("axes: {x: {key: a, valuse: [1]}}\n", "axes.x.valuse: no such key; did you mean"),
        ("axes: {x: {key: a, values: 3}}\n", "axes.x.values: expected a list of values"),
        ("axes: {x: {key: a, values: []}}\n", "axes.x: has no values."),
        ("axes: {x: {key: a, values: [1, 1]}}\n", "axes.x: 1 stands twice."),
        ("axes: {x: {levels: {a: {}}}}\n", "axes.x.levels.a: sets nothing."),
        (
            "axes: {x: {key: a.b, values: [1, 2]}, y: {key: a.b, values: [3, 4]}}\n",
            "axes.y: sets a.b, as axes.x does; one would undo the other.",
        ),
        (
            "axes: {x: {key: a.b, values: [1, 2]}}\nset: {a: {b: 3}}\n",
            "set: sets a, as axes.x does; one would undo the other.",
        ),
        ("axes: {x: {key: seed_everything, values: [1]}}\n", "is the grid's own (seeds says it)."),
        (AXES + "exclude: [{rank: 16}]\n", "exclude: axis 'rank' has no 16 (it has 8, 64)."),
        (AXES + "exclude: [{rnk: 8}]\n", "exclude: no axis is called 'rnk'; did you mean 'rank'?"),
        (AXES + "exclude: [{rank: [8, 64]}]\n", "exclude: leaves no cell."),
        (
            AXES + "exclude: [{rank: 8}]\noverrides: [{when: {rank: 8}, set: {a: 1}}]\n",
            "overrides[0]: no cell is like that.",
        ),
        (
            AXES + "comparisons: {reference: {rank: 8}}\n",
            "comparisons.reference: says nothing of axis 'type'; name one cell.",
        ),
        (
            AXES + "exclude: [{rank: 8}]\ncomparisons: {reference: {rank: 8, type: nf4}}\n",
            "comparisons.reference: that cell is excluded",
        ),
        (
            AXES + "comparisons: {trends: [type]}\n",
            "comparisons.trends: axis 'type' has no order; set its ordered: true.",
        ),
        (
            AXES + "comparisons: {reference: {rank: 8, type: nf4}, all_pairs: true}\n",
            "comparisons.reference: all_pairs compares every pair already; drop one.",
        ),
        (AXES + "comparisons: {margin: 0}\n", "comparisons.margin: must be above 0, got 0."),
        (
            AXES + "overrides: [{when: {rank: 64}, set: {model.lora.r: 8}}]\n",
            "cells rank8-nf4 and rank64-nf4 are the same run; drop one.",
        ),
        (
            "axes: {x: {key: a, values: {first: 1, last: 5}}}\n",
            "axes.x.values: give either step or factor.",
        ),
        (
            "axes: {x: {key: a, values: {first: 1, last: 5, step: -1}}}\n",
            "axes.x.values.step: -1 does not lead from 1 to 5.",
        ),
        (
            "axes: {x: {key: a, values: {first: 1, last: 2, step: 1e-5}}}\n",
            "axes.x.values: gives more than 1000 values; take larger steps.",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    problems = problems_of(HEAD + text, tmp_path)
    assert any(said in problem for problem in problems), problems


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = "axes: {x: {key: 3, values: [1]}}\nsedes: [0]\nlevel: high\n"
    assert len(problems_of(HEAD + text, tmp_path)) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("question: a\nquestion: b\n", "stands twice"),
        ("- a\n", "holds no keys"),
        ("a: [\n", "is not YAML"),
        ("", "holds no keys"),
    ],
)
def test_a_file_that_is_no_grid(tmp_path: Path, content: str, said: str) -> None:
    [problem] = problems_of(content, tmp_path)
    assert said in problem
    assert "grid.yaml" in problem


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none.yaml' could not be read"):
        read_grid(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("value", "label"),
    [(1e-4, "0.0001"), (2e-5, "2e-5"), (8, "8"), (True, "true"), (None, "null"), ("nf4", "nf4")],
)
def test_labels_are_short(value: object, label: str) -> None:
    assert label_of(value) == label


def test_without_its_extra_a_grid_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_pl.ablation.command.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r'pip install "qlora-pl\[ablation\]"'):
        ablate_command(["--config", str(tmp_path / "grid.yaml"), "--run"])


def test_a_key_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    known = ", ".join(GridFile.__dataclass_fields__)
    [problem] = problems_of(HEAD + AXES + "halving: {first_step: 4}\n", tmp_path)
    assert problem.endswith(f"halving: no such key (it has {known}).")
