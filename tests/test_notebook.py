"""The notebook is the quickstart, is kept without outputs, and runs from first cell to last.

It runs on the tiny base and for three steps: in a kernel of its own and, in half the time, as one
program whose words are told apart by its cells.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
import pytest
import warm
from nbclient import NotebookClient
from notebook_cells import assert_clean, code_cells, printed

from qlora_pl.cli import read_runs, settings

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks/quickstart.ipynb"
STEPS = 3
SAME_WORDS = """
whole = tokenizer.batch_decode(new_tokens)  # a random model says special tokens too
print([w.strip().startswith(a["answer"]) for w, a in zip(whole, after, strict=True)])
"""

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # Jupyter's own, on its way to other loops


@pytest.fixture
def notebook() -> Any:
    """The notebook as it lies in the repository."""
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the notebook is executed in."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def short(tiny_base: Path, rows_file: Path) -> Any:
    """The notebook with parameters of the tests, and a cell that looks closer."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = f"""from pathlib import Path
BASE = Path({str(tiny_base)!r})
TRAIN = VALIDATION = Path({str(rows_file)!r})
RUNS = Path("runs")
MAX_STEPS = {STEPS}"""
    check = nbformat.v4.new_code_cell(SAME_WORDS)
    check["id"] = "check"
    notebook.cells.append(check)
    return notebook


@pytest.fixture(scope="module")
def said(short: Any, workplace: Path) -> dict[str, str]:
    """What each cell prints, all run one after the other by Python itself."""
    cells = [f"print('=== {name}')\n{cell.source}\n" for name, cell in code_cells(short).items()]
    program = workplace / "notebook.py"
    program.write_text("".join(cells))
    plain = {"MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    (ended,) = warm.run(program, environments=[plain], folder=workplace)
    assert ended.returncode == 0, ended.stderr
    parts = re.split(r"^=== (.*)\n", ended.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture(scope="module")
def executed(short: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The code cells after a run in a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        client = NotebookClient(
            deepcopy(short),
            timeout=120,
            resources={"metadata": {"path": str(tmp_path_factory.mktemp("kernel"))}},
        )
        client.execute()
    return code_cells(client.nb)


def test_the_notebook_is_kept_without_outputs_and_counts(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert_clean(notebook)


def test_the_notebook_defines_nothing_of_its_own(notebook: Any) -> None:
    for cell in code_cells(notebook).values():
        assert not re.search(r"^\s*(def|class) |lambda", cell.source, re.MULTILINE), cell.id


def test_the_module_and_the_data_are_those_of_the_quickstart_experiment(
    notebook: Any, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only ``decoding`` differs, which in the experiment belongs to its samples."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("qlora_pl.cli.locate_base", lambda *_: tiny_base)
    (run,) = read_runs([["--config", "experiments/quickstart.yaml"]])
    cells = code_cells(notebook)
    scope: dict[str, Any] = {}
    exec(cells["parameters"].source.replace('Path("..")', 'Path("")'), scope)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards; the cell sets it
    exec("import logging\n" + cells["build"].source, scope)
    module, data = scope["module"], scope["data"]
    model = settings(run.model)
    for name, value in model.items():
        match name:
            case "quantization" | "lora":
                assert asdict(getattr(module, name)) == settings(value), name
            case "optimizer" | "schedule":
                assert asdict(getattr(module, f"{name}_config")) == settings(value), name
            case "decoding":
                assert module.decoding.max_new_tokens == run.samples.decoding.max_new_tokens
            case _:
                assert getattr(module, name) == value, name
    for name, value in settings(run.data).items():
        match name:
            case "sources" | "val_sources" | "test_sources":
                assert getattr(data, name).plain() == value.plain(), name
            case "template":
                assert data.chosen_template == value
            case "tokenizer":
                assert data.tokenizer_name is None  # the model's
            case "eval_batch_size":
                assert data.eval_batch_size == data.batch_size
            case _:
                assert getattr(data, name) == value, name


def test_every_cell_says_its_words(said: dict[str, str], short: Any) -> None:
    assert list(said) == list(code_cells(short))
    assert all(said[name] for name in ("before", "after", "peft-answers", "files"))


def test_the_run_lies_where_the_notebook_says(said: dict[str, str], workplace: Path) -> None:
    named = [line for line in said["files"].splitlines() if line.startswith("runs/")]
    assert "runs/notebook/version_0/adapter" in named
    assert f"runs/notebook/version_0/adapters/step-{STEPS:08d}" in named
    assert all((workplace / name).exists() for name in named)


def test_plain_peft_gives_the_very_answers(said: dict[str, str]) -> None:
    """Greedy words of equal weights in equal arithmetic, on one machine: no tolerance."""
    assert "of 8 answers are the same" in said["peft-answers"]
    assert said["check"].strip() == str([True] * 8)


@pytest.mark.slow
def test_every_cell_runs_in_a_kernel_and_the_curve_is_drawn(executed: dict[str, Any]) -> None:
    assert all(cell.execution_count for cell in executed.values())
    assert any("image/png" in output.get("data", {}) for output in executed["curve"].outputs)
    assert "runs/notebook/version_0/adapter" in printed(executed["files"])
    assert "of 8 answers are the same" in printed(executed["peft-answers"])
    assert printed(executed["check"]).strip() == str([True] * 8)


def test_a_link_of_the_notebook_leads_to_a_file(notebook: Any) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (NOTEBOOK.parent / target).exists(), target
