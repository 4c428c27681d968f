"""OpenMP: how many runtimes share a process's cores, how they wait, how many threads start."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from qlora_pl.doctor.devices.torch_devices import usable_cores
from qlora_pl.doctor.finding import Finding, Status

RUNTIME = re.compile(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$", re.MULTILINE)


def runtimes() -> list[Path]:
    """The OpenMP libraries that are loaded in this process.

    Raises:
        OSError: where the system does not say.
    """
    return sorted(
        {Path(path).resolve() for path in RUNTIME.findall(Path("/proc/self/maps").read_text())}
    )


def openmp() -> Iterator[Finding]:
    """What torch and bitsandbytes have loaded, in a process that has used both."""
    try:
        loaded = runtimes()
    except OSError:
        yield Finding(
            title="OpenMP",
            status=Status.NOTE,
            found="this system does not list the libraries of a process",
            meaning="two runtimes that spin would slow each step 5 to 30 times; qlora-pl keeps "
            "them from it",
        )
    else:
        yield of_runtimes(loaded, os.environ.get("OMP_WAIT_POLICY", ""))
    yield of_threads(torch.get_num_threads(), usable_cores())


def of_runtimes(loaded: list[Path], policy: str) -> Finding:
    """Whether the runtimes of a process disturb each other.

    Args:
        loaded: Their files.
        policy: ``OMP_WAIT_POLICY``, which qlora-pl sets to passive unless somebody has set it.
    """
    names = ", ".join(f"{path.parent.name}/{path.name}" for path in loaded) or "none is loaded"
    if len(loaded) < 2:
        return Finding(
            title="OpenMP",
            status=Status.OK,
            found=f"one runtime ({names})" if loaded else names,
            meaning="nothing disturbs it",
        )
    spins = policy.lower() not in ("passive", "")
    return Finding(
        title="OpenMP",
        status=Status.WARNING if spins else Status.OK,
        found=f"{len(loaded)} runtimes in one process ({names}), OMP_WAIT_POLICY={policy}",
        meaning="threads that wait spin on the cores of others: steps take 5 to 30 times as long"
        if spins
        else "threads that wait sleep; set the same for scripts of your own",
        fix="export OMP_WAIT_POLICY=passive" if spins else "",
    )


def of_threads(threads: int, cores: float) -> Finding:
    """Whether as many threads compute as there are cores for them."""
    if threads > cores + 1:
        return Finding(
            title="threads",
            status=Status.WARNING,
            found=f"{threads} for {cores:g} cores",
            meaning="they take turns on the cores, and each waits for all: slow on the CPU",
            fix=f"export OMP_NUM_THREADS={max(1, int(cores))}",
        )
    is_idle = threads <= cores / 2
    return Finding(
        title="threads",
        status=Status.NOTE if is_idle else Status.OK,
        found=f"{threads} for {cores:g} cores",
        meaning="training on the CPU leaves the others idle"
        if is_idle
        else "training on the CPU uses the cores that it may",
        fix="unset OMP_NUM_THREADS" if is_idle else "",
    )
