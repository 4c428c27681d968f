"""Where a shape is measured: the device, how much of it is free, how much of it may be used."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from qlora_pl.benching.settings import Workload
from qlora_pl.errors import HardwareError


def chosen_device(workload: Workload) -> torch.device:
    """Where it is measured.

    Raises:
        HardwareError: if a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if workload.device == "cuda" and not has_gpu:
        raise HardwareError("--device: torch finds no CUDA device here; leave it out.")
    if workload.memory_limit is not None and (workload.device == "cpu" or not has_gpu):
        raise HardwareError("--memory-limit: only a GPU's memory can be limited; leave it out.")
    is_gpu = has_gpu and workload.device != "cpu"
    return torch.device("cuda", 0) if is_gpu else torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; of a host, what it could make free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def limit_memory(workload: Workload, device: torch.device) -> None:
    """Let this process have no more of a GPU than the workload says."""
    if workload.memory_limit is not None and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, workload.memory_limit * 2**30 / whole))
