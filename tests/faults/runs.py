"""The run that everything happens to, what it leaves behind, and what of that must be equal.

Eighteen rows, four steps of two micro-batches an epoch, two epochs, a save every two steps, a
validation every two; NF4, dropout, clipping. It takes a second in a fork.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from conftest import ROWS, save_base

from faults.fault import Fault
from faults.fork_server import Ended, ForkServer

NAME = "tiny"
WORDS = ("fit", "--config", f"{NAME}.yaml", "--ckpt_path", "auto")
INTERVAL = 2
"""Steps between saves."""
NUM_STEPS = 8
HISTORY = ("step", "epoch", "train/loss", "optim/lr", "optim/grad_norm", "val/loss")
"""Columns of ``metrics.csv`` that do not depend on the clock or the machine's memory."""


@dataclass(frozen=True)
class Left:
    """What a finished run has left behind."""

    adapter: str
    """SHA-256 of the final weights."""
    history: list[tuple[str, ...]]
    kept: dict[str, Any]
    """``kept.json``."""
    files: list[str]
    """Names of checkpoints and adapter folders."""
    adapters: dict[str, str]
    """SHA-256 of the weights in each of the kept adapter folders."""
    samples: str
    is_complete: bool
    losses: tuple[float, ...]
    """Of the last validation and the one before training."""

    def differences(self, other: Left) -> list[str]:
        """Names of the parts that differ."""
        return [name for name in self.__dict__ if getattr(self, name) != getattr(other, name)]

    def without(self, folders: Collection[str]) -> Left:
        """Leaving out the weights of some adapter folders."""
        adapters = {name: d for name, d in self.adapters.items() if name not in folders}
        return replace(self, adapters=adapters)

    def says_at_least(self, other: Left) -> bool:
        """Whether history and samples hold all of another run's, and perhaps more at some step."""
        if len(self.history) != len(other.history):
            return False
        ours = [value for row in self.history for value in row]
        theirs = [value for row in other.history for value in row]
        says_all = all(their in ("", our) for our, their in zip(ours, theirs, strict=True))
        return says_all and set(self.samples.splitlines()) >= set(other.samples.splitlines())


def experiment(base: Path, rows: Path) -> dict[str, Any]:
    """The configuration of the run."""
    return {
        "seed_everything": 3,
        "model": {
            "model_name_or_path": str(base),
            "lora": {"r": 4, "dropout": 0.1},
            "optimizer": {"lr": 1.0e-2},
            "gradient_checkpointing": False,
        },
        "data": {
            "sources": [{"path": str(rows)}],
            "template": "guanaco",
            "val_size": 2,
            "batch_size": 2,
        },
        "samples": {"num_prompts": 1, "decoding": {"max_new_tokens": 2}},
        "checkpoint": {"every_n_steps": INTERVAL},
        "trainer": {
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
            "val_check_interval": 4,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "accelerator": "cpu",
            "devices": 1,
        },
    }


class Runs:
    """Starts runs in workplaces of their own, all alike.

    Args:
        folder: For everything.
        prefix: See ``ForkServer``.
    """

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        base, rows = folder / "base", folder / "rows.jsonl"
        save_base(base)
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:18]))
        self._experiment = yaml.safe_dump(experiment(base, rows))
        self._number = 0
        self.server = ForkServer(folder / "logs", prefix)
        self.cold = self.new_workplace(is_warm=False)
        self.cold_run = self.run(self.cold)
        """The uninterrupted run, which fills the caches."""
        self.seconds = 0.0
        """What one takes from the caches."""
        assert self.cold_run.code == 0, self.cold_run.said
        self.expected = self.left(self.cold)

    @cached_property
    def warm_run(self) -> Ended:
        """The same from what the first has cached."""
        warm, began = self.new_workplace(), time.perf_counter()
        ended = self.run(warm)
        self.seconds = time.perf_counter() - began
        assert self.left(warm) == self.expected, ended.said
        return ended

    @cached_property
    def of_two_ranks(self) -> Left:
        """What the uninterrupted run on two processes leaves behind."""
        from faults.ranks import WORDS as MORE
        from faults.ranks import places

        workplace = self.new_workplace()
        ended = self.run(workplace, None, *MORE, environments=places())
        assert ended.codes == [0, 0], ended.said
        return self.left(workplace)

    def close(self) -> None:
        """End the server."""
        self.server.close()

    def new_workplace(self, is_warm: bool = True) -> Path:
        """A folder to run in; if warm, with what earlier runs have cached."""
        self._number += 1
        workplace = self.folder / f"place{self._number}"
        (workplace / "tmp").mkdir(parents=True)
        (workplace / f"{NAME}.yaml").write_text(self._experiment)
        if is_warm:
            shutil.copytree(self.cold / "cache", workplace / "cache")
        return workplace

    def copy(self, workplace: Path) -> Path:
        """A workplace as another one is now."""
        self._number += 1
        copied = self.folder / f"place{self._number}"
        shutil.copytree(workplace, copied, symlinks=True)
        return copied

    def run(self, workplace: Path, fault: Fault | None = None, *words: str, **more: Any) -> Ended:
        """Run the command in a workplace."""
        return self.server.run([*WORDS, *words], workplace, fault, **more)

    def all(self, workplace: Path) -> list[Path]:
        """The folders of all runs, the newest first."""
        runs = (workplace / "runs" / NAME).glob("version_*")
        return sorted(runs, key=lambda path: -int(path.name.removeprefix("version_")))

    def newest(self, workplace: Path) -> Path | None:
        """The folder of the newest run."""
        return next(iter(self.all(workplace)), None)

    def left(self, workplace: Path) -> Left:
        """What the newest run has left behind."""
        run = self.newest(workplace)
        assert run is not None
        metrics = json.loads((run / "metrics.json").read_text())
        saved = [*run.glob("checkpoints/*"), *run.glob("adapters/*"), *run.glob(".incomplete*")]
        return Left(
            adapter=_digest(run / "adapter/adapter_model.safetensors"),
            history=history(run),
            kept=json.loads((run / "checkpoints/kept.json").read_text()),
            files=sorted(str(path.relative_to(run)) for path in saved),
            adapters={
                folder.name: _digest(folder / "adapter_model.safetensors")
                for folder in sorted(run.glob("adapters/step-*"))
                if (folder / "adapter_model.safetensors").is_file()
            },
            samples=(run / "samples.jsonl").read_text(),
            is_complete=metrics["is_complete"],
            losses=(metrics["val/loss"], metrics["before"]["val/loss"]),
        )


def history(run: Path) -> list[tuple[str, ...]]:
    """What ``metrics.csv`` says of each step, without timings."""
    with (run / "metrics.csv").open(newline="") as file:
        return [tuple(row[name] for name in HISTORY) for row in csv.DictReader(file)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
