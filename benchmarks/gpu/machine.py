"""What the checks are run on: device, driver, and versions of what they check."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from processes import REPOSITORY

LIBRARIES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "numpy")


def has_cuda() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def describe_machine(is_rehearsal: bool) -> dict[str, Any]:
    """Device and driver, as nvidia-smi says; takes no memory of the device."""
    cpu = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if is_rehearsal:
        return {"device": "CPU (rehearsal)", "driver": None, **cpu}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        device, driver, memory = (part.strip() for part in said.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        device, driver, memory = "a CUDA device (nvidia-smi does not say which)", None, None
    return {"device": device, "driver": driver, "memory": memory, **cpu}


def versions() -> dict[str, str | None]:
    """Of Python, of the libraries, and of this repository."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        said = ""
    return found | {"commit": said or None}
