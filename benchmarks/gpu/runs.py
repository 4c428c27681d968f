"""Runs of the command line that a check starts, alone or as two ranks, and what they left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from processes import environment, free_port

from gpu.place import Place

STEPS = 4
MIDDLE = 2
"""Saved too; where runs go on from."""
GLOO = {"process_group_backend": "gloo"}
DDP, FSDP2 = "qlora_pl.strategies.ddp.AdapterDDP", "qlora_pl.strategies.fsdp2.FSDP2Strategy"


def configuration(place: Place, name: str) -> dict[str, Any]:
    """Four packed rows a step in float32, without dropout: what every layout must agree on."""
    return {
        "seed_everything": 7,
        "run": {"name": name, "root": str(place.folder / "runs"), "timeout_seconds": 120},
        "model": {
            "model_name_or_path": str(place.base()),
            "quantization": {"compute_dtype": "float32"},
            "lora": {"r": 8, "dropout": 0.0},
            "optimizer": {"name": "paged_adamw_32bit", "lr": 1.0e-2},
            "schedule": {"name": "constant"},
        },
        "data": {
            "sources": str(place.rows()),
            "template": "guanaco",
            "val_size": 4,
            "max_length": 192,
            "packing": True,
            "batch_size": 1,
            "global_batch_size": 4,
        },
        "samples": {"prompts": []},
        "checkpoint": {"every_n_steps": MIDDLE, "keep_last": 9},
        "trainer": {
            "accelerator": place.accelerator,
            "devices": 1,
            "max_steps": STEPS,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "gpu.notes.Notes", "init_args": {"folder": str(_logs(place, name))}}
            ],
        },
    }


def merge(into: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change values of a nested configuration; ``callbacks`` are added to what is there."""
    for key, value in changes.items():
        if key == "callbacks":
            into[key] = [*into[key], *value]
        elif isinstance(value, Mapping) and isinstance(into.get(key), dict) and key != "strategy":
            merge(into[key], value)
        else:
            into[key] = value
    return into


def _logs(place: Place, name: str) -> Path:
    return place.folder / "logs" / name


class Run:
    """One run, as a number of processes that each believe to be alone on their machine.

    Two ranks on one GPU are two machines with one process each, as Kubernetes would start them: a
    launcher gives every rank of a machine a GPU of its own.

    Args:
        place: Where.
        name: Of the run, once in a place.
        num_ranks: How many processes.
        words: That follow ``qlora-pl fit --config FILE``.
        cache: Name of the folder for packed copies, which each rank has for itself; None: no other
            run uses it.
        changes: Of ``configuration``.
    """

    def __init__(
        self,
        place: Place,
        name: str,
        *,
        num_ranks: int = 1,
        words: Iterable[str] = (),
        cache: str | None = None,
        **changes: Mapping[str, Any],
    ) -> None:
        self.place, self.name, self.num_ranks = place, name, num_ranks
        self.words = list(words)
        self.cache = place.folder / "caches" / (cache or name)
        self.logs = _logs(place, name)
        self.config = merge(configuration(place, name), changes)
        if num_ranks > 1:
            self.config["trainer"]["devices"] = "auto"
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def config_path(self) -> Path:
        """The file that the run is started with."""
        return self.logs / "run.yaml"

    def start(self) -> None:
        """Start every process."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(json.dumps(self.config, indent=1))  # JSON is YAML
        command = [sys.executable, "-m", "qlora_pl", "fit", "--config", str(self.config_path)]
        shared: dict[str, Any] = {}
        if self.num_ranks > 1:
            shared = {"WORLD_SIZE": self.num_ranks, "MASTER_ADDR": "127.0.0.1"}
            shared |= {"MASTER_PORT": free_port()}
        if self.config["trainer"]["accelerator"] == "cpu" and not self.place.is_rehearsal:
            shared["OMP_NUM_THREADS"] = 4
        for rank in range(self.num_ranks):
            own = {"RANK": rank} if self.num_ranks > 1 else {}
            cache = f"{self.cache}-{rank}"  # each machine has its own
            with (self.logs / f"log-{rank}.txt").open("wb") as log:
                process = subprocess.Popen(
                    [*command, *self.words],
                    env=environment(QLORA_PL_CACHE=cache, **shared, **own),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self._processes.append(process)

    def wait(self) -> list[int]:
        """Exit codes, when all have ended."""
        return [process.wait() for process in self._processes]

    @property
    def said(self) -> str:
        """What the first process printed."""
        return (self.logs / "log-0.txt").read_text(errors="replace")

    def failure(self, codes: list[int]) -> str:
        """Exit codes and the ends of all logs."""
        logs = [path.read_text(errors="replace") for path in sorted(self.logs.glob("log-*.txt"))]
        return f"run {self.name}: exit codes {codes}\n" + "\n".join(log[-2500:] for log in logs)

    # -- what it left ----------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The run's own."""
        found = sorted((self.place.folder / "runs" / self.name).glob("version_*"))
        if not found:
            raise RuntimeError(f"run {self.name} has left no folder")
        return found[-1]

    def checkpoint(self, step: int) -> Path:
        """Of a step that was saved."""
        return self.folder / "checkpoints" / f"step-{step:08d}.ckpt"

    def base_checksum(self) -> int:
        """What the run itself says of its base, in its last checkpoint."""
        import torch

        loaded = torch.load(self.checkpoint(STEPS), map_location="cpu", weights_only=True)
        return int(loaded["frozen_base"]["checksum"])

    def adapter_bytes(self) -> bytes:
        """The finished adapter's file."""
        return (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()

    def metrics(self) -> dict[str, Any]:
        """``metrics.json``."""
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return found

    def notes(self, rank: int = 0) -> dict[str, Any]:
        """What ``Notes`` wrote down."""
        found: dict[str, Any] = json.loads((self.logs / f"notes-{rank}.json").read_text())
        return found


def complete(*runs: Run) -> None:
    """Start runs, some at a time, and wait for all; what another check has completed is kept.

    Raises:
        RuntimeError: with exit codes and the ends of logs, if one fails.
    """
    for codes, run in zip(finish(*runs), runs, strict=True):
        if any(codes):
            raise RuntimeError(run.failure(codes))


def finish(*runs: Run) -> list[list[int]]:
    """The same for runs of which some may fail: the exit codes of each."""
    codes: dict[str, list[int]] = {}
    at_a_time = runs[0].place.num_at_a_time
    for first in range(0, len(runs), at_a_time):
        batch = [run for run in runs[first : first + at_a_time] if not _is_done(run)]
        for run in batch:
            run.start()
        for run in batch:
            codes[run.name] = run.wait()
            if not any(codes[run.name]):
                (run.logs / "done").touch()
    return [codes.get(run.name, [0]) for run in runs]


def _is_done(run: Run) -> bool:
    return (run.logs / "done").is_file()


def adapter_distance(ours: Run, theirs: Run) -> dict[str, float]:
    """How far two adapters lie apart: the largest element, and the norm relative to B's.

    B begins at zero, so the norm of all B is how far a run has come.
    """
    from safetensors.torch import load

    mine, other = load(ours.adapter_bytes()), load(theirs.adapter_bytes())
    if mine.keys() != other.keys():
        raise RuntimeError(f"{ours.name} and {theirs.name} have other tensors")
    gaps = [mine[name].double() - other[name].double() for name in other]
    moved = [tensor.double() for name, tensor in other.items() if "lora_B" in name]
    return {
        "largest_difference": max(float(gap.abs().max()) for gap in gaps),
        "relative_difference": _norm(gaps) / _norm(moved),
    }


def _norm(tensors: list[Any]) -> float:
    return float(sum(float(tensor.square().sum()) for tensor in tensors)) ** 0.5


def step_distance(ours: Run, theirs: Run, key: str, first_step: int = 1) -> float:
    """The largest relative difference of a number of the steps: ``loss`` or ``norm``."""
    expected = {step["step"]: step[key] for step in theirs.notes()["steps"]}
    found = {step["step"]: step[key] for step in ours.notes()["steps"]}
    if found.keys() != {step for step in expected if step >= first_step}:
        raise RuntimeError(f"{ours.name} took steps {sorted(found)}, not from {first_step} on")
    return max(abs(value - expected[step]) / abs(expected[step]) for step, value in found.items())
