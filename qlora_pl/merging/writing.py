"""Tensors that come one at a time -> a folder of sharded safetensors that plain programs load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qlora_pl.files import share_as_folder

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2**30
"""What a file holds at most, and so what waits in memory; a larger tensor has one of its own."""


def write_shards(
    folder: Path, groups: Iterable[Mapping[str, Tensor]], limit: int = SHARD_BYTES
) -> int:
    """Write tensors as they come, a file whenever one is full; returns their bytes.

    Args:
        folder: That exists.
        groups: Tensors by name; those of a group lie in one file, as a 4-bit matrix and what it is
            decoded with.
        limit: Bytes of a file.
    """
    waiting: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    held = total = 0
    for group in groups:
        size = sum(tensor.numel() * tensor.element_size() for tensor in group.values())
        if waiting and held + size > limit:
            shards.append(_write(folder, len(shards), waiting))
            held = 0
        waiting |= {name: tensor.contiguous() for name, tensor in group.items()}
        held += size
        total += size
    shards.append(_write(folder, len(shards), waiting))
    files = {
        name: _final_name(place, len(shards))
        for place, names in enumerate(shards)
        for name in names
    }
    for place in range(len(shards)):
        _unnumbered(folder, place).rename(folder / _final_name(place, len(shards)))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write(folder: Path, place: int, waiting: dict[str, Tensor]) -> list[str]:
    from safetensors.torch import save_file

    save_file(waiting, _unnumbered(folder, place), metadata={"format": "pt"})
    share_as_folder(_unnumbered(folder, place))
    names = list(waiting)
    waiting.clear()
    return names


def _unnumbered(folder: Path, place: int) -> Path:
    return folder / f"shard-{place}.safetensors"  # until it is known how many there are


def _final_name(place: int, number: int) -> str:
    if number == 1:
        return "model.safetensors"
    return f"model-{place + 1:05d}-of-{number:05d}.safetensors"


def bytes_of(dtype: torch.dtype) -> int:
    """Of an element."""
    return torch.empty(0, dtype=dtype).element_size()
