"""What can happen to a file that was written well: bits flip, ends are lost, files go missing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from faults.runs import NAME
from qlora_pl.training.run_folders.run_folder import checkpoints_newest_first

TARGETS = (
    "checkpoint",
    "its digest",
    "adapter folder",
    "4-bit cache",
    "row cache",
    "fingerprints",
)
WAYS = ("bit flip", "torn", "zeroed", "empty", "missing")
PAGE = 4096
"""Bytes that a disk loses at a time."""


def spoil(path: Path, way: str, draw: random.Random) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    # Unlinked first: a published adapter shares its files with the step's folder.
    path.unlink()
    if way == "missing":
        return
    if way == "bit flip":
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
    elif way == "torn":
        del data[draw.randrange(len(data)) :]
    elif way == "zeroed":
        page = draw.randrange((len(data) + PAGE - 1) // PAGE) * PAGE
        data[page : page + PAGE] = bytes(len(data[page : page + PAGE]))
    elif way == "empty":
        data.clear()
    path.write_bytes(data)


def files_of(workplace: Path, target: str) -> list[Path]:
    """The files that a target may be."""
    runs = sorted((workplace / "runs" / NAME).glob("version_*"))
    newest = checkpoints_newest_first(runs[-1])[0]
    if target == "checkpoint":
        return [newest]
    if target == "its digest":
        return [newest.with_name(newest.name + ".sha256")]
    if target == "adapter folder":
        return _files(runs[-1] / "adapters" / newest.stem)
    folder = {"4-bit cache": "packed", "row cache": "data", "fingerprints": "fingerprints"}[target]
    return _files(workplace / "cache" / folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def spoiler(target: str, way: str, draw: random.Random) -> Callable[[Path], str]:
    """Damages one file of a target in a workplace, and says which."""

    def apply(workplace: Path) -> str:
        path = draw.choice(files_of(workplace, target))
        spoil(path, way, draw)
        return f"{way}: {target} ({path.name})"

    return apply
