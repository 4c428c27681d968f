"""The NVIDIA driver, asked through its own program, without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_pl.doctor.finding import Finding, Status

QUERY = "name,driver_version,memory.total,compute_cap"
SECONDS = 15
"""nvidia-smi takes several where no persistence daemon keeps the driver awake."""


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says.

    Attributes:
        version: Of the driver.
        cuda: The newest CUDA that it runs, "12.4"; "" where it does not say.
        gpus: Name, memory and compute capability of each GPU, in nvidia-smi's words.
    """

    version: str
    cuda: str
    gpus: list[str]


class DriverError(RuntimeError):
    """nvidia-smi is there and has failed; the message is its own."""


def ask_driver() -> Driver | None:
    """What the driver says; None where there is none.

    Raises:
        DriverError: if it is there and does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        if Path("/proc/driver/nvidia/version").exists():
            raise DriverError("the driver is loaded, and nvidia-smi is not on PATH")
        return None
    table = _run(program, f"--query-gpu={QUERY}", "--format=csv,noheader")
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line]
    rows = [row for row in rows if len(row) == len(QUERY.split(","))]
    if not rows:
        raise DriverError(table.strip().splitlines()[0] if table.strip() else "it names no GPU")
    found = re.search(r"CUDA Version:\s*([\d.]+)", _run(program))
    gpus = [f"{name}, {memory}, capability {capability}" for name, _, memory, capability in rows]
    return Driver(version=rows[0][1], cuda=found[1] if found else "", gpus=gpus)


def _run(*words: str) -> str:
    """What a program prints.

    Raises:
        DriverError: if it fails or does not end.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise DriverError(f"nvidia-smi does not answer within {SECONDS} s") from None
    except OSError as error:
        raise DriverError(f"nvidia-smi cannot be started ({error.strerror})") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise DriverError(said[0] if said else f"nvidia-smi ended with {done.returncode}")
    return done.stdout


def nvidia_driver() -> Iterator[Finding]:
    """Whether the driver answers, and which GPUs it has."""
    try:
        driver = ask_driver()
    except DriverError as error:
        yield Finding(
            title="NVIDIA driver",
            status=Status.BROKEN,
            found=str(error),
            meaning="a run would not find the GPU and train on the CPU, a hundred times slower",
            fix="sudo nvidia-smi; sudo dmesg | grep -i nvrm",
        )
        return
    if driver is None:
        yield Finding(
            title="NVIDIA driver",
            status=Status.NOTE,
            found="none",
            meaning="training runs on the CPU: fit for small models and for trying things out",
        )
        return
    newest = f", runs CUDA up to {driver.cuda}" if driver.cuda else ""
    yield Finding(
        title="NVIDIA driver",
        status=Status.OK,
        found=f"{driver.version}{newest}; {in_numbers(driver.gpus)}",
        meaning="the driver answers",
    )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        yield Finding(
            title="CUDA_VISIBLE_DEVICES",
            status=Status.WARNING,
            found=f"'{hidden}' hides every GPU",
            meaning="training runs on the CPU",
            fix="unset CUDA_VISIBLE_DEVICES",
        )


def in_numbers(names: list[str]) -> str:
    """Names, equal ones counted: ``2 x NVIDIA L4``."""
    counts = {name: names.count(name) for name in names}
    return "; ".join(name if n == 1 else f"{n} x {name}" for name, n in counts.items())
