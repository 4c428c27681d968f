"""What the operating system allows: limits that end a run long after it has begun."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from qlora_pl.doctor.finding import Finding, Status

MIB = 2**20
ENOUGH_FILES = 1024
ENOUGH_SHARED = 1024 * MIB
"""Bytes of /dev/shm; Docker's default is 64 MiB."""

SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "BNB_CUDA_VERSION",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONUTF8",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "QLORA_PL_CACHE",
    "PL_GLOBAL_SEED",
    "NCCL_P2P_DISABLE",
    "NCCL_IB_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "MASTER_ADDR",
    "WORLD_SIZE",
    "SLURM_JOB_ID",
)
"""Variables that change what a run does; none of them holds a secret."""
HOSTS = ("HF_ENDPOINT", "MASTER_ADDR")
"""Those whose values name machines, which concern nobody else."""
SLOWING = {
    "CUDA_LAUNCH_BLOCKING": "each operation waits for the one before it, several times slower",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "each tensor is asked of the driver anew, many times slower",
}


def open_files() -> Iterator[Finding]:
    """How many files a process may have open; each loader process takes some."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    no_limit = resource.RLIM_INFINITY
    is_enough = soft == no_limit or soft >= ENOUGH_FILES
    highest = ENOUGH_FILES if hard == no_limit else min(hard, max(ENOUGH_FILES, 65536))
    yield Finding(
        title="open files",
        status=Status.OK if is_enough else Status.WARNING,
        found="unlimited" if soft == no_limit else f"{soft:,} at a time",
        meaning="enough for loader processes and sharded weights"
        if is_enough
        else "data.num_workers and weights in many files end in 'Too many open files'",
        fix="" if is_enough else f"ulimit -n {highest}",
    )


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """The memory through which loader processes and NCCL hand over what they have."""
    if not folder.is_dir():
        yield Finding(
            title=str(folder),
            status=Status.NOTE,
            found="there is none",
            meaning="loader processes hand their batches over another way here",
        )
        return
    usage = shutil.disk_usage(folder)
    is_enough = usage.free >= ENOUGH_SHARED
    yield Finding(
        title=str(folder),
        status=Status.OK if is_enough else Status.WARNING,
        found=f"{usage.free / MIB:,.0f} of {usage.total / MIB:,.0f} MiB free",
        meaning="enough for loader processes and NCCL"
        if is_enough
        else "with data.num_workers above 0, or several GPUs, a run may die of 'Bus error'",
        fix="" if is_enough else "docker run --shm-size=8g ...",
    )


def encoding() -> Iterator[Finding]:
    """How Python reads a text file that does not say how."""
    import locale

    name = locale.getpreferredencoding(False)
    is_utf8 = name.lower().replace("-", "").replace("_", "") == "utf8"
    yield Finding(
        title="text encoding",
        status=Status.OK if is_utf8 else Status.BROKEN,
        found=name,
        meaning="configurations and templates are read as they were written"
        if is_utf8
        else "configurations, templates and rows with other letters than English ones are misread",
        fix="" if is_utf8 else "export PYTHONUTF8=1",
    )


def clock() -> Iterator[Finding]:
    """Whether the clock stands before a moment that has certainly passed: the installation's."""
    now = time.time()
    installed = _newest_file()
    days = (installed - now) / 86400
    is_right = days < 1
    yield Finding(
        title="clock",
        status=Status.OK if is_right else Status.WARNING,
        found=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)),
        meaning="not before the installation"
        if is_right
        else f"{days:,.0f} days before the newest installed file: downloads fail at certificates, "
        "and the newest run is not the last",
        fix="" if is_right else "timedatectl set-ntp true",
    )


def settings() -> Iterator[Finding]:
    """Environment variables that change what a run does."""
    given = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
    for name in sorted(given.keys() & SLOWING.keys()):
        if given[name] != "0":
            yield Finding(
                title="environment",
                status=Status.WARNING,
                found=f"{name}={given[name]}",
                meaning=SLOWING[name],
                fix=f"unset {name}",
            )
    shown = ", ".join(
        f"{name} is set" if name in HOSTS else f"{name}={value}" for name, value in given.items()
    )
    yield Finding(
        title="environment",
        status=Status.NOTE if given else Status.OK,
        found=shown or "no variable is set that changes a run",
        meaning="somebody has set it, and a run heeds it" if given else "the defaults",
    )


def _newest_file() -> float:
    """When the newest of the installed packages was written, in seconds since 1970."""
    specs = (find_spec(name) for name in ("qlora_pl", "packaging", "yaml"))
    files = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
    return max((file.stat().st_mtime for file in files), default=0.0)
