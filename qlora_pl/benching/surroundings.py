"""Where and with what figures were taken: versions, device, clocks, threads."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "triton", "lightning", "transformers", "peft", "bitsandbytes", "trl", "numpy")
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
"""Nothing in them says who or where; other variables are not looked at."""
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


def describe_surroundings() -> dict[str, Any]:
    """Everything that a figure is worth nothing without, in plain types."""
    import torch  # slow to import

    has_gpu = torch.cuda.is_available()
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "device": torch.cuda.get_device_name() if has_gpu else cpu_name(),
        "gpu": gpu_state() if has_gpu else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_mhz": cpu_mhz(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := version_of(name))},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "commit": commit(),
    }


def version_of(name: str) -> str | None:
    """Of an installed package; None: there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """As the system has it."""
    return next(_cpu_lines("model name"), platform.processor() or platform.machine())


def cpu_mhz() -> float | None:
    """The highest clock of the cores just now; None: the system does not say."""
    return max(map(float, _cpu_lines("cpu MHz")), default=None)


def gpu_state() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU: clocks, limits, driver; None: it says nothing."""
    words = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [part.strip() for part in said.partition("\n")[0].split(",")]
    return dict(zip(QUERY.split(","), values, strict=False))


def commit() -> str | None:
    """Of the repository that this package is run from; None: it is not."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip() or None


def _cpu_lines(name: str) -> Any:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return (line.partition(":")[2].strip() for line in lines if line.startswith(name))


if __name__ == "__main__":
    print(json.dumps(describe_surroundings()))
