"""A small grid over a tiny base, and the commands that run it, for the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
NUMBERS = ("val/loss", "train/loss", "optim/grad_norm", "rows", "tokens", "step")
"""Of metrics.json: what does not depend on the clock."""


def write_grid(folder: Path, base: Path, rows: Path, **changes: Any) -> Path:
    """A grid of two ranks and two seeds, six steps each, saved every two."""
    training = {
        "model": {"model_name_or_path": str(base), "lora": {"r": 4, "dropout": 0.1}},
        "data": {
            "sources": str(rows),
            "val_size": 4,
            "batch_size": 2,
            "global_batch_size": 4,
            "max_length": 64,
        },
        "checkpoint": {"every_n_steps": 2},
        "trainer": {
            "max_steps": 6,
            "accelerator": "cpu",
            "devices": 1,
            "val_check_interval": 4,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
    }
    grid = {
        "question": "Does the rank matter?",
        "base": "base.yaml",
        "axes": {"rank": {"key": "model.lora.r", "values": [2, 4], "ordered": True}},
        "seeds": [0, 1],
        "comparisons": {"reference": {"rank": 4}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(training))
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(grid | changes))
    return path


def command(*words: object) -> list[str]:
    """``qlora-pl ablate`` with these words."""
    return [sys.executable, "-m", "qlora_pl", "ablate", *map(str, words)]


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    return subprocess.Popen(
        command(*words),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *words: object) -> str:
    """The command to its end, which must be good; what it printed."""
    process = start(folder, *words)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def outcomes(root: Path) -> dict[str, dict[str, Any]]:
    """What each run under a root came to, by its identity."""
    found = {}
    for path in sorted((root / "runs").glob("*/fit/version_*/metrics.json")):
        metrics = json.loads(path.read_text())
        found[path.parents[2].name] = {name: metrics.get(name) for name in NUMBERS}
    return found
