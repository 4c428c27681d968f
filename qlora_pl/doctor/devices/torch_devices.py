"""The devices as torch sees them, and what it can do on each."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from qlora_pl.doctor.devices.driver import DriverError, ask_driver, in_numbers
from qlora_pl.doctor.finding import Finding, Status, first_line

GIB = 2**30
LEAST_CAPABILITY = (6, 0)
"""Of a GPU for 4 bits, by bitsandbytes' documentation; 7.5 for int8."""
UNTESTED = "AMD's ROCm, Intel's XPU, Apple's MPS and NPUs"
"""Kinds of devices upon which no test of this project has ever run."""
OLDEST_DRIVERS = {"11": 450, "12": 525, "13": 580}
"""By CUDA's major version: NVIDIA's table of CUDA's minor version compatibility."""


def torch_library() -> Iterator[Finding]:
    """Torch, and what it was built for."""
    yield Finding(
        title="torch",
        status=Status.OK,
        found=f"{torch.__version__}, built for {built_for()}",
        meaning="it imports",
    )


def built_for() -> str:
    """The kind of device that this torch was built for."""
    version: Any = torch.version
    for name, label in (("cuda", "CUDA"), ("hip", "ROCm"), ("xpu", "XPU")):
        if number := getattr(version, name, None):
            return f"{label} {number}"
    return "CPUs alone"


def training_devices() -> list[torch.device]:
    """The devices that a run can use, the CPU last: CUDA's, ROCm's among them, and the CPU."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [*gpus, torch.device("cpu")]


def devices() -> Iterator[Finding | str]:
    """The GPUs that torch can use, and what keeps it from using others."""
    yield "the start of CUDA"
    error = _start_cuda()
    count = torch.cuda.device_count() if error is None else 0
    for index in range(count):
        yield f"cuda:{index}"
        yield from _gpu(index)
    if not count:
        yield _no_gpu(error)
    untested = list(untested_devices(torch, platform.system()))
    yield from untested
    if not untested:
        yield Finding(
            title="other devices",
            status=Status.NOTE,
            found="none",
            meaning=f"{UNTESTED} were never tested here: whatever works there is luck",
        )


def _start_cuda() -> str | None:
    """Start CUDA; what it says if it cannot."""
    try:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return None


def _no_gpu(error: str | None) -> Finding:
    """Why torch has no GPU, where the driver says that there is one."""
    try:
        driver = ask_driver()
    except DriverError:
        driver = None  # its own line says so
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is None or (hidden is not None and hidden.strip() in ("", "-1")):
        return Finding(
            title="devices",
            status=Status.NOTE,
            found="the CPU",
            meaning="training runs there: fit for small models and for trying things out",
        )
    if torch.version.cuda is None:
        return Finding(
            title="devices",
            status=Status.BROKEN,
            found=f"{in_numbers(driver.gpus)}, and a torch built for {built_for()}",
            meaning="training would run on the CPU, a hundred times slower",
            fix="pip uninstall --yes torch; pip install --constraint constraints.txt torch",
        )
    is_old = too_old(driver.version, torch.version.cuda)
    return Finding(
        title="devices",
        status=Status.BROKEN,
        found=error or "torch finds no GPU",
        meaning=is_old
        or "the driver has a GPU that torch cannot start: training would run on the CPU",
        fix="sudo apt-get install nvidia-driver-580" if is_old else "sudo dmesg | grep -i nvrm",
    )


def too_old(driver: str, cuda: str) -> str:
    """What follows if a driver is too old for the CUDA that torch was built for; "" if it is not.

    Args:
        driver: "535.104.05".
        cuda: "12.8".
    """
    oldest = OLDEST_DRIVERS.get(cuda.split(".")[0])
    if oldest is None or not driver.split(".")[0].isdigit() or int(driver.split(".")[0]) >= oldest:
        return ""
    return (
        f"CUDA {cuda} needs a driver from {oldest} on, and this is {driver}: training would run on "
        "the CPU; a torch for an older CUDA works as well"
    )


def _gpu(index: int) -> Iterator[Finding]:
    """One GPU: its kind, what is free of its memory, and what its generation lacks."""
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    is_busy = free < 0.9 * total
    yield Finding(
        title=f"cuda:{index}",
        status=Status.WARNING if is_busy else Status.OK,
        found=f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, capability "
        f"{capability[0]}.{capability[1]}",
        meaning="another program holds some of its memory"
        if is_busy
        else generation(capability, bool(torch.version.hip)),
        fix="nvidia-smi" if is_busy else "",
    )
    if not torch.version.hip and capability < LEAST_CAPABILITY:
        yield Finding(
            title=f"cuda:{index}",
            status=Status.BROKEN,
            found=f"capability {capability[0]}.{capability[1]}",
            meaning="bitsandbytes' 4 bits need 6.0 or newer: use another GPU, or the CPU",
            fix="export CUDA_VISIBLE_DEVICES=-1",
        )


def generation(capability: tuple[int, int], is_rocm: bool = False) -> str:
    """What a GPU of this compute capability can do, as far as this project uses it."""
    if is_rocm:
        return "through ROCm, which was never tested here"
    if capability >= (8, 0):
        return "bfloat16, int8 and 4 bits"
    if capability >= (7, 5):
        return "int8 and 4 bits, and float16 with a loss scaler: bfloat16 needs 8.0"
    if capability >= LEAST_CAPABILITY:
        return "4 bits, and float16 with a loss scaler: bfloat16 needs 8.0, int8 7.5"
    return "nothing that this project needs"


def untested_devices(library: Any, system: str) -> Iterator[Finding]:
    """Devices upon which no test of this project has ever run.

    Args:
        library: torch.
        system: The operating system's name.
    """
    found = []
    if getattr(library.version, "hip", None):
        found.append(("ROCm", f"ROCm {library.version.hip}", "training may work on it"))
    if hasattr(library, "xpu") and library.xpu.is_available():
        found.append(("XPU", "an Intel GPU", "runs do not use it unless trainer.accelerator does"))
    if system == "Darwin" and library.backends.mps.is_available():
        found.append(("MPS", "an Apple GPU", "bitsandbytes' 4 bits may be missing on it"))
    if find_spec("torch_npu") is not None:
        found.append(("NPU", "torch_npu is installed", "bitsandbytes may know it, this does not"))
    for title, what, meaning in found:
        yield Finding(
            title=title,
            status=Status.WARNING,
            found=what,
            meaning=f"never tested here; {meaning}",
            fix="qlora-pl fit --trainer.accelerator cpu ...",
        )


def processor() -> Iterator[Finding]:
    """The CPU's instructions: 4 bits need AVX2, bfloat16 more."""
    capability = torch.backends.cpu.get_cpu_capability()
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    has_avx2 = capability not in ("DEFAULT", "NO AVX")
    if platform.machine() in ("x86_64", "AMD64") and not has_avx2:
        status, meaning = Status.WARNING, "no AVX2: 4 bits on the CPU need it, GPUs do not"
    elif native:
        status, meaning = Status.OK, "bfloat16 in hardware: 4-bit training on the CPU uses it"
    else:
        status, meaning = Status.OK, "no bfloat16 in hardware: training on the CPU uses float32"
    cores, usable = os.cpu_count() or 1, usable_cores()
    yield Finding(
        title="processor",
        status=status,
        found=f"{capability}, {usable:g} of {cores} cores usable",
        meaning=meaning,
    )


def usable_cores() -> float:
    """Cores that this process may use, by its affinity and its container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        return cores
