"""Tensors that come one at a time -> a folder of sharded safetensors that plain programs load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2**30
"""What a file holds at most, and so what waits in memory; a larger tensor has one of its own."""


def plan_shards(sizes: Sequence[tuple[str, int]], limit: int = SHARD_BYTES) -> dict[str, str]:
    """Names of tensors -> files, in order.

    Args:
        sizes: Names, and bytes of each.
        limit: Bytes of a file.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes:
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    number = len(shards)
    if number == 1:
        return dict.fromkeys(shards[0], "model.safetensors")
    return {
        name: f"model-{place:05d}-of-{number:05d}.safetensors"
        for place, names in enumerate(shards, start=1)
        for name in names
    }


def write_shards(folder: Path, files: dict[str, str], tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write tensors as they come, each file when its last one is there; returns their bytes.

    Args:
        folder: That exists.
        files: From ``plan_shards``.
        tensors: In the same order.
    """
    from safetensors.torch import save_file

    waiting: dict[str, Tensor] = {}
    missing = {file: sum(other == file for other in files.values()) for file in files.values()}
    total = 0
    for name, tensor in tensors:
        waiting[name] = tensor.contiguous()
        total += tensor.numel() * tensor.element_size()
        missing[files[name]] -= 1
        if not missing[files[name]]:
            save_file(waiting, folder / files[name], metadata={"format": "pt"})
            waiting.clear()
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def bytes_of(dtype: torch.dtype) -> int:
    """Of an element."""
    return torch.empty(0, dtype=dtype).element_size()
