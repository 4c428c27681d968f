"""How much memory a process of a run may count on: of its GPU, or of the host it shares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

GIB = 2**30
CONTROL_GROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


class DeviceMemory(NamedTuple):
    """Bytes that a process may use."""

    capacity: int
    """All that there is; of a host, this process's share."""
    free: int
    """What nobody else has taken, at most ``capacity``."""


def device_memory(
    device: torch.device, num_local: int = 1, limit_gib: float | None = None
) -> DeviceMemory:
    """What there is for a process now.

    Args:
        device: Where it trains.
        num_local: Processes of the run on this machine, which share the memory of a host.
        limit_gib: What a user lets each of them have; None: all.
    """
    if device.type == "cuda":
        free, capacity = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)
    else:
        free, capacity = (size // num_local for size in host_memory())
    limit = capacity if limit_gib is None else int(limit_gib * GIB)
    return DeviceMemory(min(capacity, limit), min(free, limit))


def host_memory() -> tuple[int, int]:
    """Bytes of this machine's, or this container's, memory: what is free, and all."""
    free, total = _of_machine()
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        taken = int((CONTROL_GROUP / "memory.current").read_text()) - _reclaimable()
    except (OSError, ValueError):  # there is none, or it says "max"
        return free, total
    return min(free, max(0, limit - taken)), min(total, limit)


def _reclaimable() -> int:
    """Of a container's memory: pages of files, which the kernel drops when it needs room."""
    lines = (line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    return sum(int(size) for name, size in lines if name == "inactive_file")


def _of_machine() -> tuple[int, int]:
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free, total = (int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    except (OSError, ValueError, KeyError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    return 1024 * free, 1024 * total  # in KiB
