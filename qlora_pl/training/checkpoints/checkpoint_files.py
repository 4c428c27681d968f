"""The files of a run's checkpoints: written in one order, read against their digests, deleted last.

A kill between any two operations leaves a run whose newest checkpoint verifies and has its product,
and what it leaves besides is cleared away when the run goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from qlora_pl.errors import CheckpointError, ConfigurationError
from qlora_pl.files import (
    remove_leftovers,
    serialize,
    sha256_bytes,
    write_atomic,
    write_json,
)
from qlora_pl.training.checkpoints.adapter_save import ProductSave
from qlora_pl.training.run_folders.run_folder import (
    damage,
    digest_path,
    newest_verified,
    product_path,
    step_of,
)


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, its SHA-256 beside it, and checks it on reading.

    ``torch.load`` reads a file with a flipped bit without a word.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Serialise to memory, then write the digest, then the data that make it valid."""
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and primitives onto the CPU.

        Raises:
            CheckpointError: if the file is not what was written, or holds code.
        """
        if damage(Path(path), anew=True) is not None:
            raise CheckpointError(f"'{path}' is damaged or has no digest; use another checkpoint.")
        try:
            loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # UnpicklingError, RuntimeError: whoever wrote its digest too
            raise CheckpointError(
                f"'{path}' holds more than tensors and plain values, which is not run here, or is "
                "no checkpoint at all; use one that qlora_pl wrote."
            ) from error
        return loaded


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint after its digest, without which it counts as damaged.

    Raises:
        TrainingStoppedError: if the disk is full or the folder cannot be written to.
    """
    data = serialize(checkpoint)
    write_atomic(digest_path(path), f"{sha256_bytes(data)}  {path.name}\n")
    write_atomic(path, data)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which steps of a run are saved, and which stay; fields as in ``AdapterCheckpoint``."""

    every_n_steps: int
    keep_last: int
    keep_best: int
    keep_every_n_steps: int | None
    mode: Literal["min", "max"]

    def __post_init__(self) -> None:
        problems = [
            f"checkpoint.{name}: must be at least {least}, got {value}."
            for name, least in (
                ("every_n_steps", 1),
                ("keep_last", 1),
                ("keep_best", 0),
                ("keep_every_n_steps", 1),
            )
            if (value := getattr(self, name)) is not None and value < least
        ]
        if problems:
            raise ConfigurationError(problems)

    def saves(self, step: int) -> bool:
        """Whether a step is saved for its number alone."""
        every = self.keep_every_n_steps
        return step == 1 or step % self.every_n_steps == 0 or bool(every and step % every == 0)

    def best(self, scores: Mapping[int, float]) -> list[int]:
        """The best steps of those that have a score, the best first."""
        sign = 1 if self.mode == "min" else -1
        return sorted(scores, key=lambda step: (sign * scores[step], step))[: self.keep_best]

    def keep(self, saved: Sequence[int], scores: Mapping[int, float]) -> list[int]:
        """The steps of ``saved``, oldest first, that stay.

        One that was saved for another reason than its number, such as a signal, is not counted
        among the last when a newer one is there: a stop leaves no trace in a run that goes on.
        """
        numbered = [step for step in saved if self.saves(step) or step == saved[-1]]
        some = {*numbered[-self.keep_last :], *self.best(scores)}
        every = self.keep_every_n_steps
        return [step for step in saved if step in some or (every and step % every == 0)]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which of a run's checkpoints stay; ``kept.json``."""

    run: Path
    """Its folder."""
    product: str
    """``adapter`` or ``model``."""
    steps: tuple[int, ...]
    best_step: int | None
    best_score: float | None

    def write(self) -> None:
        """Say what is kept, then delete what is not.

        In this order: a kill in between leaves too much, and never a best step that is gone.

        Raises:
            TrainingStoppedError: if the disk is full or the folder cannot be written to.
        """
        write_json(
            self.run / "checkpoints" / "kept.json",
            {"steps": self.steps, "best_step": self.best_step, "best_score": self.best_score},
        )
        for path in (self.run / "checkpoints").glob("step-*.ckpt"):
            if step_of(path) not in self.steps:
                path.unlink()
        # What a kill between two deletions left has no checkpoint any more.
        for digest in (self.run / "checkpoints").glob("step-*.ckpt.sha256"):
            if step_of(digest.with_suffix("")) not in self.steps:
                digest.unlink()
        names = {product_path(self.run, step, self.product).name for step in self.steps}
        for folder in product_path(self.run, 0, self.product).parent.glob("step-*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)


def refuse_other_run(run: Path, resumed: Any) -> None:
    """A folder that holds another run is not written to.

    Args:
        run: The folder.
        resumed: The checkpoint that this run continues, or None.

    Raises:
        ConfigurationError: if the folder holds a newer one, or any where none is continued.
    """
    newest = newest_verified(run)
    if newest is not None and (resumed is None or Path(resumed).resolve() != newest.resolve()):
        raise ConfigurationError(
            f"'{run}' holds another run, which is never overwritten; resume it with "
            f"--ckpt_path {newest}, or choose another folder."
        )


def clear_leftovers(run: Path) -> None:
    """Remove the temporary files and folders of a process that was killed in a save."""
    for folder in (run, run / "checkpoints", run / "adapters", run / "models"):
        remove_leftovers(folder)


def write_save(
    product: ProductSave, folder: Path, checkpoint: dict[str, Any], path: Path, kept: Kept
) -> None:
    """Write a save whole, read it back, and only then delete what it replaces.

    The product first: a step whose checkpoint is there has its product, wherever a kill came.

    Args:
        product: Of the step.
        folder: Where it goes.
        checkpoint: Copies, of which nothing changes any more.
        path: Where it goes.
        kept: What stays, this save included.

    Raises:
        QLoRAError: if anything cannot be written, or reads back differently.
    """
    shutil.rmtree(folder, ignore_errors=True)
    product.write()
    write_checkpoint(path, checkpoint)
    product.verify(path)
    kept.write()
