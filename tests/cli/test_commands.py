"""What the commands of a run print, and which files they leave."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.words import FIT
from qlora_pl.__main__ import main

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


def test_help_answers_without_torch() -> None:
    """Counted in imported modules, which no slow machine changes."""
    code = (
        "import sys; sys.argv = ['qlora-pl', '--help']\n"
        "from qlora_pl.__main__ import main; main()\n"
        "slow = {'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'} & {*sys.modules}\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stdout


def test_help_of_a_key_says_what_it_means(
    type_in: Callable[..., tuple[int, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    sys.argv = ["qlora-pl", "fit", "--help"]
    with pytest.raises(SystemExit):
        main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "Rank: rows of A and columns of B." in printed
    assert "Rows of a micro-batch on one device, or packs" in printed


def test_print_config_gives_a_file_that_runs(
    type_in: Callable[..., tuple[int, list[str]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    flags = ("--data.template", "guanaco", "--data.val_size", "2", "--model.lora.r", "4")
    limits = (
        "--trainer.max_steps",
        "1",
        "--trainer.accelerator",
        "cpu",
        "--samples.num_prompts",
        "0",
    )
    type_in(*FIT, *flags, *limits)
    assert [path.name for path in tmp_path.glob("runs/*/*")] == ["version_0"]
    saved = next(tmp_path.glob("runs/*/version_0/run.yaml"))
    code, printed = type_in("fit", "--config", str(saved))
    assert code == 0, printed
    adapters = sorted(tmp_path.glob("runs/*/version_*/adapter/adapter_model.safetensors"))
    assert len(adapters) == 2
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_the_commands_that_do_not_train_say_and_write_their_metrics(
    type_in: Any, tmp_path: Path
) -> None:
    """The counts are those of the files: 22 rows, 3 of them set apart for validation."""
    common = (
        *("--model.model_name_or_path", "BASE", "--data.sources", "ROWS", "--run.name", "tiny"),
        *("--model.lora.r", "4"),
        *("--data.template", "guanaco", "--data.val_size", "3", "--trainer.accelerator", "cpu"),
        *("--data.test_sources", "ROWS", "--model.decoding.max_new_tokens", "3"),
        *("--samples.num_prompts", "0"),
    )
    assert type_in("fit", *common, "--trainer.max_steps", "2")[0] == 0
    for command in ("validate", "test", "predict"):
        code, printed = type_in(command, *common, "--ckpt_path", "last")
        assert code == 0, printed
        metrics = json.loads((tmp_path / f"runs/tiny/{command}_0/metrics.json").read_text())
        assert metrics["command"] == command
        assert metrics["rows"] == {"validate": 3, "test": 22, "predict": 3}[command]
        assert isinstance(metrics["rows"], int)
        assert metrics["checkpoint"].endswith("tiny/version_0/checkpoints/step-00000002.ckpt")
        figures = ""
        if command != "predict":
            split = {"validate": "val", "test": "test"}[command]
            loss, perplexity = metrics[f"{split}/loss"], metrics[f"{split}/perplexity"]
            assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)  # it is in float32
            figures = f"loss {loss:.4f}, perplexity {perplexity:.4f}: "
        assert type_in.told[-1] == f"{command}: {figures}runs/tiny/{command}_0"
    fitted = json.loads((tmp_path / "runs/tiny/version_0/metrics.json").read_text())
    validated = json.loads((tmp_path / "runs/tiny/validate_0/metrics.json").read_text())
    assert validated["val/loss"] == pytest.approx(fitted["val/loss"], rel=1e-6)
    answers = (tmp_path / "runs/tiny/predict_0/predictions.jsonl").read_text().splitlines()
    assert len(answers) == 3
    assert set(json.loads(answers[0])) == {"prompt", "answer", "reference"}


LOGGERS = {
    "none": {"logger": False},
    "csv": {
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "elsewhere"},
        }
    },
    "default": {},
}


@pytest.mark.parametrize("logger", LOGGERS)
def test_no_logger_moves_the_folder_the_checkpoints_or_the_adapter(
    type_in: Callable[..., tuple[int, list[str]]], tmp_path: Path, logger: str
) -> None:
    config = {"trainer": {"max_steps": 2, "accelerator": "cpu", **LOGGERS[logger]}}
    code, printed = type_in(*FIT, "--data.template", "guanaco", config=config)
    assert code == 0, printed
    run = tmp_path / "runs/run/version_0"
    names = {path.name for path in run.iterdir()}
    assert {"run.yaml", "environment.json", "metrics.csv", "metrics.json"} <= names
    assert {"samples.jsonl", "checkpoints", "adapters", "adapter"} <= names
    assert [path.name for path in (run / "checkpoints").glob("*2.ckpt")] == ["step-00000002.ckpt"]
    assert any("tfevents" in name for name in names) == (logger == "default")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    sys.argv = ["qlora-pl", "--version"]
    assert main() == 0
    assert capsys.readouterr().out.startswith("qlora-pl 0.")
