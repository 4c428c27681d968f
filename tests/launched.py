"""Runs whose processes are started from outside: the files they need, and ways to start them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC", "SLURM_", "QLORA_PL_RUN", "NODE_")


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        """What it said as errors to its user."""
        lines = self.err.splitlines()
        return [line.removeprefix("qlora-pl: ") for line in lines if line.startswith("qlora-pl: ")]


def write_config(folder: Path, base: Path, rows: Path, **changes: Any) -> Path:
    """Five optimizer steps of eight rows in plain SGD, which hides no difference."""
    config: dict[str, Any] = {
        "run": {"name": "launched", "root": str(folder / "runs")},
        "model": {
            "model_name_or_path": str(base),
            "quantization": {"compute_dtype": "float32"},
            "lora": {"r": 4, "dropout": 0.0},
            "optimizer": {"name": "sgd", "lr": 1.0},
            "gradient_checkpointing": False,
        },
        "data": {"sources": str(rows), "template": "guanaco", "val_size": 2, "batch_size": 2},
        "samples": {"prompts": []},
        "checkpoint": {"every_n_steps": 1, "keep_last": 9},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 5,
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
    }
    for section, values in changes.items():
        config[section] |= values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment(**variables: object) -> dict[str, str]:
    """This process's, without what another launcher or run left in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not any(part in name for part in OF_A_LAUNCHER)
    }
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return kept | {name: str(value) for name, value in variables.items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(command: Sequence[str], **variables: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(*processes: subprocess.Popen[str], seconds: float = 400) -> list[Ended]:
    """Wait for all; none outlives the test."""
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, *text) for p, text in zip(processes, said, strict=True)]


def start_pods(command: Sequence[str], number: int, **variables: object) -> list[Any]:
    """One process a pod, with the variables that Kubeflow's PyTorchJob sets."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": number}
    return [start(command, **shared, RANK=rank, **variables) for rank in range(number)]


def fit(config: Path, *words: str) -> list[str]:
    return [sys.executable, *fit_module(config, *words)]


def fit_module(config: Path, *words: str) -> list[str]:
    return ["-m", "qlora_pl", "fit", "--config", str(config), *words]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def largest_move(tensors: dict[str, Tensor]) -> float:
    """How far the B matrices, which start at zero, have come."""
    return max(float(torch.max(t.abs())) for name, t in tensors.items() if "lora_B" in name)


def has_slurm() -> bool:
    return all(shutil.which(name) for name in ("sbatch", "slurmctld", "slurmd", "munged"))
