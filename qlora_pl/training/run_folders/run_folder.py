"""Where a run writes, and which checkpoint ``--ckpt_path last`` and ``auto`` mean.

    runs/<name>/version_<N>/          one folder a training run, never used by another
        run.yaml  metrics.csv  metrics.json  events.out.tfevents.*
        checkpoints/step-00000010.ckpt (+ .sha256)   to resume
        adapters/step-00000010/                      to use, one for each checkpoint
        adapter/                                     the finished run's
        models/step-00000010/  model/                instead, if the base was trained whole
    runs/<name>/validate_<N>/         likewise for the commands that do not train

A run that resumes continues in its own folder. Lightning would make a new one, find no checkpoint
there and begin at step 0 with a warning.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_pl.errors import CheckpointError, ConfigurationError
from qlora_pl.files import sha256_file

FOLDER_VARIABLE = "QLORA_PL_RUN_FOLDER"
"""Hands the folder that the first process made to the processes that Lightning starts."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run's folder lies."""

    name: str | None = None
    """The experiment; None: the configuration file's name, else the base's."""
    root: str = "runs"
    """The folder of all experiments."""
    timeout_seconds: float = 1800.0
    """How long a process waits for the others of a run before it gives up. What one alone does
    while the others wait must be done by then: reading rows, packing the base."""

    memory_gib: float | None = None
    """GiB that each process may count on, of its GPU or of the host, where ``data.batch_size`` or
    ``model.gradient_checkpointing`` is ``auto``; None: what is free."""

    def __post_init__(self) -> None:
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ConfigurationError(f"run.memory_gib: must be above 0, got {self.memory_gib}.")
        if self.timeout_seconds <= 0:
            raise ConfigurationError(
                f"run.timeout_seconds: must be above 0, got {self.timeout_seconds}."
            )
        if self.name is not None and not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigurationError(
                f"run.name: '{self.name}' becomes a folder; use letters, digits, '.', '_' and '-'."
            )
        if self.name is not None and not self.name.strip("."):
            raise ConfigurationError(
                f"run.name: '{self.name}' would lie outside run.root; name a folder in it."
            )

    @property
    def experiment(self) -> Path:
        """The folder of all runs of this experiment."""
        return Path(self.root).expanduser() / str(self.name)


def new_folder(config: RunConfig, command: str) -> Path:
    """Make the next folder of an experiment; two processes never get the same one."""
    prefix = "version" if command == "fit" else command
    try:
        config.experiment.mkdir(parents=True, exist_ok=True)
        taken = [number for number, _ in _numbered(config.experiment, prefix)]
        number = max(taken, default=-1) + 1
        while True:
            folder = config.experiment / f"{prefix}_{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder
    except OSError as error:
        raise ConfigurationError(
            f"run.root: no folder could be made in '{config.root}' ({error.strerror})."
        ) from error


def _numbered(experiment: Path, prefix: str) -> Iterator[tuple[int, Path]]:
    for path in experiment.glob(f"{prefix}_*"):
        number = path.name.removeprefix(f"{prefix}_")
        if path.is_dir() and number.isdigit():
            yield int(number), path


def runs_newest_first(config: RunConfig) -> list[Path]:
    """The training runs of an experiment."""
    return [path for _, path in sorted(_numbered(config.experiment, "version"), reverse=True)]


# -- checkpoints -----------------------------------------------------------------------------------


def checkpoint_path(run: Path, step: int) -> Path:
    """The checkpoint of a run at an optimizer step."""
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def product_path(run: Path, step: int, product: str) -> Path:
    """The folder of what a run has made at an optimizer step: an ``adapter`` or a ``model``."""
    return run / f"{product}s" / f"step-{step:08d}"


def digest_path(checkpoint: Path) -> Path:
    """The file beside a checkpoint that ``sha256sum -c`` reads."""
    return checkpoint.with_name(checkpoint.name + ".sha256")


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name, or -1."""
    found = re.fullmatch(r"step-(\d+)\.ckpt", checkpoint.name)
    return int(found[1]) if found else -1


def damage(checkpoint: Path, anew: bool = False) -> str | None:
    """Why a checkpoint is not, byte for byte, what was written, in a clause; or None.

    Args:
        checkpoint: The file.
        anew: Whether to hash it even if this process has, and it has not been written to since.
    """
    record = digest_path(checkpoint)
    if not checkpoint.is_file():
        return "it is missing"
    if not record.is_file():
        return f"{record.name} is missing"
    if recorded_digest(checkpoint) != _digest(checkpoint, anew):
        return f"its SHA-256 is not what {record.name} says"
    return None


def recorded_digest(checkpoint: Path) -> str:
    """The SHA-256 that was written beside a checkpoint; whatever stands there if it is damaged."""
    return digest_path(checkpoint).read_text(errors="replace").partition(" ")[0]


def _digest(checkpoint: Path, anew: bool) -> str:
    """A start asks about the same gigabytes half a dozen times, and hashes them twice."""
    if anew:
        return sha256_file(checkpoint)
    status = checkpoint.stat()
    return _hashed(checkpoint.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _hashed(checkpoint: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(checkpoint)


def verifies(checkpoint: Path) -> bool:
    """Whether a checkpoint is there and is, byte for byte, what was written."""
    return damage(checkpoint) is None


def checkpoints_newest_first(run: Path) -> list[Path]:
    """All checkpoints of a run, verified or not."""
    found = (run / "checkpoints").glob("step-*.ckpt")
    return sorted((path for path in found if step_of(path) >= 0), key=step_of, reverse=True)


def newest_verified(run: Path, passed_over: list[str] | None = None) -> Path | None:
    """The newest checkpoint of a run that verifies.

    Args:
        run: Its folder.
        passed_over: Takes a clause for each newer one that does not, and why.
    """
    for path in checkpoints_newest_first(run):
        if (problem := damage(path)) is None:
            return path
        if passed_over is not None:
            passed_over.append(f"'{path}' ({problem})")
    return None


def is_complete(run: Path) -> bool:
    """Whether a run reached its end, which ``metrics.json`` says."""
    try:
        return bool(json.loads((run / "metrics.json").read_text())["is_complete"])
    except (OSError, ValueError, KeyError):
        return False


@dataclass(frozen=True)
class Resolved:
    """A run's folder, and the checkpoint that it starts from."""

    folder: Path
    checkpoint: Path | None
    is_resumed: bool
    """Whether the folder is that of the run which wrote the checkpoint."""
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that are damaged, each with the reason."""

    def plain(self) -> dict[str, Any]:
        """The same in plain types, with absolute paths, for other processes."""
        return {
            "folder": str(self.folder.resolve()),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint.resolve()),
            "is_resumed": self.is_resumed,
            "passed_over": list(self.passed_over),
        }

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> Resolved:
        """What ``plain`` was made of."""
        checkpoint = value["checkpoint"]
        return cls(
            Path(value["folder"]),
            None if checkpoint is None else Path(checkpoint),
            bool(value["is_resumed"]),
            tuple(value["passed_over"]),
        )

    def out_of_sight(self) -> str | None:
        """Why a process of another node cannot take part in this run, in a sentence; or None."""
        for path in (self.folder, self.checkpoint):
            if path is not None and not path.exists():
                return (
                    f"'{path}' is not there; set run.root to a folder on a file system that all "
                    "nodes share."
                )
        return None


def resolve_run(config: RunConfig, command: str, ckpt_path: str | None) -> Resolved:
    """Choose the folder of a run and the checkpoint that ``ckpt_path`` means.

    Args:
        config: Name and root of the experiment.
        command: ``fit``, ``validate``, ``test`` or ``predict``; only ``fit`` continues a folder.
        ckpt_path: ``last``: the newest run of the experiment with a checkpoint that verifies.
            ``auto``: its newest unfinished run, or a new one. ``best``: the best checkpoint of the
            newest run. Else a path; None: none.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    # Only a process that Lightning started has a local rank; the first makes its own folder.
    handed_over = None if is_first_process() else os.environ.get(FOLDER_VARIABLE)
    passed_over: list[str] = []
    checkpoint = find_checkpoint(config, ckpt_path, passed_over)
    if checkpoint is not None and command == "fit":
        run = checkpoint.parent.parent
        if checkpoint.parent.name == "checkpoints" and newest_verified(run) == checkpoint:
            return Resolved(run, checkpoint, True, tuple(passed_over))
        # An older checkpoint branches off: its folder holds what came after, which stays as it is.
    folder = Path(handed_over) if handed_over else new_folder(config, command)
    return Resolved(folder, checkpoint, False, tuple(passed_over))


def is_first_process() -> bool:
    """Whether this process was started by a user, and not by Lightning for a further device."""
    return "LOCAL_RANK" not in os.environ


def forget_if_nothing_happened(resolved: Resolved) -> None:
    """Remove the folder that was made for a run which failed before it came to anything."""
    results = ("metrics.csv", "metrics.json", "predictions.jsonl", "checkpoints")
    if not resolved.is_resumed and not any((resolved.folder / name).exists() for name in results):
        shutil.rmtree(resolved.folder, ignore_errors=True)


def completed_run(config: RunConfig, ckpt_path: str | None, trainer: Any) -> Path | None:
    """The run that ``last`` or a path would resume, if it has reached what this one asks for.

    Args:
        config: Name and root of the experiment.
        ckpt_path: As in ``resolve_run``.
        trainer: Holds this run's ``max_steps`` and ``max_epochs``; more of either goes on.
    """
    if ckpt_path in (None, "auto", "best"):
        return None
    checkpoint = find_checkpoint(config, ckpt_path)
    if checkpoint is None or not is_complete(run := checkpoint.parent.parent):
        return None
    if newest_verified(run) != checkpoint:
        return None
    reached = json.loads((run / "metrics.json").read_text())
    wants_steps = trainer.max_steps != -1 and trainer.max_steps > reached["step"]
    limit = -1 if trainer.max_epochs is None else trainer.max_epochs
    reached_epochs = -1 if reached["max_epochs"] is None else reached["max_epochs"]
    wants_epochs = limit > reached_epochs != -1
    return None if wants_steps or wants_epochs else run


def find_checkpoint(
    config: RunConfig, ckpt_path: str | None, passed_over: list[str] | None = None
) -> Path | None:
    """The verified checkpoint that ``ckpt_path`` means; see ``resolve_run``."""
    if ckpt_path is None:
        return None
    runs = runs_newest_first(config)
    if ckpt_path in ("last", "auto"):
        # A run that died before its first checkpoint has nothing to continue, and hides nothing.
        for run in runs:
            if (found := newest_verified(run, passed_over)) is not None:
                return None if ckpt_path == "auto" and is_complete(run) else found
        if ckpt_path == "auto":
            return None
        raise CheckpointError(
            f"--ckpt_path last: no run in '{config.experiment}' has a checkpoint that verifies; "
            "start without --ckpt_path."
        )
    if ckpt_path == "best":
        return _best(config, runs)
    path = Path(ckpt_path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"--ckpt_path: no file '{ckpt_path}' (or last, auto, best).")
    if problem := damage(path):
        raise CheckpointError(
            f"--ckpt_path: '{ckpt_path}' is damaged: {problem}; use another checkpoint."
        )
    return path.resolve()


def _best(config: RunConfig, runs: list[Path]) -> Path:
    for run in runs:
        try:
            step = json.loads((run / "checkpoints" / "kept.json").read_text())["best_step"]
        except (OSError, ValueError, KeyError):
            continue
        if step is not None and verifies(found := checkpoint_path(run, step)):
            return found.resolve()
    raise CheckpointError(
        f"--ckpt_path best: no run in '{config.experiment}' has a best checkpoint; it needs "
        "validation rows and checkpoint.monitor."
    )
