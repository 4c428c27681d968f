"""``RunRecord``: what a run was, so that it can be understood and run again.

``run.yaml`` is the whole configuration and is itself a file for ``--config``; ``environment.json``
holds what a configuration cannot say: versions, hardware, the state of the code, the command.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from qlora_pl.files import write_atomic, write_json
from qlora_pl.redaction import redact
from qlora_pl.training.watching.monitoring import RunMetrics

PACKAGES = (
    "qlora-pl",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "torchmetrics",
    "tensorboard",
    "jsonargparse",
)
ALLOCATOR = "_ALLOC_CONF"
"""How the variables end that set torch's allocator."""


class RunRecord(SaveConfigCallback):
    """Writes the record at the start, and hyper-parameters with the final metrics at the end."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``run.yaml`` and ``environment.json``; a resumed run adds a pair of its own."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        suffix = ""
        if (folder / "run.yaml").exists():
            step = Path(str(self.config.ckpt_path)).stem
            suffix = f"-resumed-{step}"
            number = 1
            while (folder / f"run{suffix}.yaml").exists():
                number += 1
                suffix = f"-resumed-{step}-{number}"
        self.path = folder / f"run{suffix}.yaml"
        self._write()
        write_json(folder / f"environment{suffix}.json", environment())

    def _write(self) -> None:
        self.text = self.parser.dump(self.config, skip_unset=False)
        write_atomic(self.path, self.text)

    def settle(self, values: Mapping[str, Any]) -> None:
        """Have ``run.yaml`` say what ``auto`` came to; on the process that wrote it.

        Args:
            values: By their dotted keys.
        """
        for key, value in values.items():
            self.config[key] = value
        self._write()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log hyper-parameters once, with the metrics they led to, for TensorBoard's HParams."""
        if not trainer.is_global_zero:
            return
        metrics = next((c.last for c in _callbacks(trainer) if isinstance(c, RunMetrics)), {})
        names = ("train/loss", "val/loss", "val/perplexity")
        shown = {f"final/{name}": metrics[name] for name in names if name in metrics}
        parameters = {
            key: value
            for key, value in flatten(yaml.safe_load(self.text)).items()
            if key.split(".")[0] in ("model", "data", "seed_everything")
            or key in ("trainer.max_steps", "trainer.accumulate_grad_batches")
        }
        for log in trainer.loggers:
            if isinstance(log, TensorBoardLogger):
                log.log_hyperparams(parameters, shown, step=trainer.global_step)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists become text."""
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    is_plain = isinstance(value, int | float | str | bool)
    return {prefix: value if is_plain else json.dumps(value)}


def environment() -> dict[str, Any]:
    """Versions, hardware, code and command."""
    return {
        "command": ["qlora-pl", *map(redact, sys.argv[1:])],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "cpu_threads": torch.get_num_threads(),
        "allocator": {
            name: value for name, value in os.environ.items() if name.endswith(ALLOCATOR)
        },
        "git": git_state(Path(__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds a folder, and whether files differ; None outside one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "is_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
