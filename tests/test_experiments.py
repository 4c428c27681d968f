"""Every file under experiments/ and configs/ is parsed, and the paper's are run on a tiny base."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_pl.__main__ import main
from qlora_pl.cli import read_runs

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
PARTS = sorted((ROOT / "configs").glob("*/*.yaml"))
GUANACO = [path for path in EXPERIMENTS if path.stem.startswith("guanaco")]

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


def name(path: Path) -> str:
    return path.stem


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v
            for key, inner in value.items()
            for k, v in leaves(inner, f"{prefix}/{key}").items()
        }
    return {prefix: value}


@pytest.fixture
def quickstart_base(monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    """The quickstart's base exists only after ``make quickstart``."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("qlora_pl.cli.locate_base", lambda *_: tiny_base)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_an_experiment_is_a_run_without_a_mistake(path: Path, quickstart_base: None) -> None:
    (run,) = read_runs([["--config", str(path)]])
    assert run.run.name == path.stem


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_part_fits_its_group(path: Path, quickstart_base: None) -> None:
    words = [
        "--config",
        str(ROOT / "experiments/quickstart.yaml"),
        f"--{path.parent.name}",
        str(path),
    ]
    assert len(read_runs([words])) == 1


@pytest.mark.parametrize("path", [*EXPERIMENTS, *PARTS], ids=name)
def test_a_file_says_its_numbers_so_that_every_parser_reads_them(path: Path) -> None:
    """No dotted keys (they lose references), no ``2e-4`` (YAML 1.1 reads text)."""
    for key, value in leaves(yaml.safe_load(path.read_text())).items():
        assert "." not in key, f"{path.name}: {key}"
        assert not re.fullmatch(r"[\d.]+e-?\d+", str(value)) or isinstance(value, float), key


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_an_experiment_opens_with_its_command_and_its_source(path: Path) -> None:
    opening = path.read_text().split("\n\n")[0]
    assert f"qlora-pl fit --config experiments/{path.name}" in opening
    assert "Source: " in opening


@pytest.mark.parametrize(
    ("size", "base", "rate", "dropout"),
    [
        ("7b", "llama-7b", 2.0e-4, 0.1),
        ("13b", "llama-13b", 2.0e-4, 0.1),
        ("33b", "llama-30b", 1.0e-4, 0.05),
        ("65b", "llama-65b", 1.0e-4, 0.05),
    ],
)
def test_guanaco_has_the_papers_numbers(size: str, base: str, rate: float, dropout: float) -> None:
    """Dettmers et al. 2023, table 9, the rows of OASST1."""
    (run,) = read_runs([["--config", str(ROOT / f"experiments/guanaco{size}.yaml")]])
    assert run.model.model_name_or_path == f"huggyllama/{base}"
    assert (run.model.optimizer.lr, run.model.lora.dropout) == (rate, dropout)
    assert (run.model.lora.r, run.model.lora.alpha) == (64, 16)
    assert run.model.quantization.quant_type == "nf4"
    assert run.model.quantization.double_quant
    assert run.model.optimizer.name == "paged_adamw_32bit"
    assert run.model.schedule.name == "constant"
    assert run.trainer.max_steps == 1875
    assert run.trainer.gradient_clip_val == 0.3
    assert run.data.batch_size * run.trainer.accumulate_grad_batches == 16


@pytest.mark.parametrize("path", GUANACO[-2:], ids=name)
def test_a_shrunken_base_trains_the_very_file_for_three_steps(
    path: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"### Human: What is {n}?### Assistant: It is {n}."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(path), "--model.model_name_or_path", str(tiny_base)]
    words += ["--data.sources", "rows.jsonl", "--data.val_sources", "rows.jsonl"]
    words += ["--trainer.max_steps", "3", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    words += ["--trainer.enable_progress_bar", "false", "--samples.decoding.max_new_tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["qlora-pl", *words])
    assert main() == 0
    run = tmp_path / f"runs/{path.stem}/version_0"
    manifest = json.loads((run / "adapter/manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["quantization"]["quant_type"] == "nf4"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["rows"] == 48
