"""Breaks the project's own saving, each function in one way that the harness has to notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_pl import files
from qlora_pl.training.checkpoints import checkpoint, checkpoint_files


def writes_in_place() -> None:
    """A checkpoint is written under its own name."""

    def write(path: Path, data: bytes | str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    checkpoint_files.write_atomic = write  # type: ignore[attr-defined]


def writes_adapter_last() -> None:
    """The checkpoint is there before its adapter folder."""

    def write_save(product: Any, folder: Path, content: Any, path: Path, kept: Any) -> None:
        checkpoint_files.write_checkpoint(path, content)
        product.write()
        product.verify(path)
        kept.write()

    checkpoint.write_save = write_save  # type: ignore[attr-defined]


def never_syncs() -> None:
    """Files get their names before their bytes are on the disk."""

    def write(path: Path, data: bytes | str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    files._write_synced = write


def forgets_random_states() -> None:
    """A resumed run draws other dropout masks."""
    checkpoint.restore_random_states = lambda states: None  # type: ignore[attr-defined]
