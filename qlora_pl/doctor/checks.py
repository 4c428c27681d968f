"""The table of checks: their order, which processes they run in, and what each stands upon.

A check is named here and found in its file by name, so that the table costs no import and a
process imports only what its own checks need.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from qlora_pl.doctor.finding import Trial

HERE = "here"
"""The lane of checks that touch no heavy library: a thread each in doctor's own process."""
LIBRARIES = {"torch": "torch", "ranks": "torch", "hub": "huggingface-hub"}
"""Upon which the checks of a lane stand."""
IMPORT = 3.0
"""How much longer an import may take than another check: a first one from a network disk does."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Attributes:
        name: Also the section of docs/troubleshooting.md that explains its findings.
        title: What is looked at, in the report.
        group: The heading that it stands under.
        lane: Checks of one lane run one after another in one process; ``HERE``: in doctor's.
        trial: Where it is, ``module:function`` in this folder.
        needs: Checks of its lane without which it is not tried, if they themselves failed.
        patience: How many times the ordinary time limit it may take.
        asks_network: Whether ``--offline`` leaves it out.
    """

    name: str
    title: str
    group: str
    lane: str
    trial: str
    needs: tuple[str, ...] = ()
    patience: float = 1.0
    asks_network: bool = False

    def load(self) -> Trial:
        """The check's function."""
        module, _, function = self.trial.partition(":")
        trial: Trial = getattr(import_module(f"qlora_pl.doctor.{module}"), function)
        return trial

    def repair(self) -> str:
        """A command that installs anew what the check stands upon; "" where that is nothing."""
        library = LIBRARIES.get(self.lane, "")
        if "bitsandbytes" in (self.name, *self.needs):
            library = "bitsandbytes"
        # with what it asks for: builds of torch for CUDA need packages that one for CPUs does not
        again = f"pip uninstall --yes {library}; pip install --constraint constraints.txt {library}"
        return again if library else ""


def _check(
    name: str, title: str, group: str, lane: str, trial: str, *needs: str, patience: float = 1.0
) -> Check:
    return Check(
        name=name,
        title=title,
        group=group,
        lane=lane,
        trial=trial,
        needs=needs,
        patience=patience,
        asks_network=lane == "hub",
    )


CHECKS = (
    _check("python", "Python", "Installation", HERE, "installation.packages:python"),
    _check("platform", "platform", "Installation", HERE, "installation.packages:platform"),
    _check("packages", "packages", "Installation", HERE, "installation.packages:packages"),
    _check("conflicts", "conflicts", "Installation", HERE, "installation.packages:conflicts"),
    _check(
        "torch",
        "torch",
        "Installation",
        "torch",
        "devices.torch_devices:torch_library",
        patience=IMPORT,
    ),
    _check(
        "bitsandbytes",
        "bitsandbytes",
        "Installation",
        "torch",
        "arithmetic.four_bits:bitsandbytes_library",
        "torch",
        "devices",
        patience=IMPORT,
    ),
    _check(
        "imports",
        "libraries",
        "Installation",
        "imports",
        "installation.imports:imports",
        patience=IMPORT,
    ),
    _check("extras", "extras", "Installation", HERE, "installation.packages:extras"),
    _check("driver", "NVIDIA driver", "Devices", HERE, "devices.driver:nvidia_driver"),
    _check("devices", "devices", "Devices", "torch", "devices.torch_devices:devices", "torch"),
    _check("allocator", "allocator", "Devices", "torch", "devices.segments:allocator", "devices"),
    _check(
        "processor", "processor", "Devices", "torch", "devices.torch_devices:processor", "torch"
    ),
    _check(
        "compute-dtype",
        "compute dtype",
        "Arithmetic",
        "torch",
        "arithmetic.products:auto",
        "devices",
    ),
    _check("float32", "float32", "Arithmetic", "torch", "arithmetic.products:float32", "devices"),
    _check(
        "bfloat16", "bfloat16", "Arithmetic", "torch", "arithmetic.products:bfloat16", "devices"
    ),
    _check("float16", "float16", "Arithmetic", "torch", "arithmetic.products:float16", "devices"),
    _check("int8", "int8", "Arithmetic", "torch", "arithmetic.four_bits:int8", "bitsandbytes"),
    _check("nf4", "NF4", "Arithmetic", "torch", "arithmetic.four_bits:nf4", "bitsandbytes"),
    _check("fp4", "FP4", "Arithmetic", "torch", "arithmetic.four_bits:fp4", "bitsandbytes"),
    _check(
        "gradients",
        "gradients after an evaluation",
        "Arithmetic",
        "torch",
        "arithmetic.gradients:gradients_after_evaluation",
        "bitsandbytes",
        patience=IMPORT,
    ),
    _check("openmp", "OpenMP", "Arithmetic", "torch", "arithmetic.openmp:openmp", "bitsandbytes"),
    _check("memory", "memory", "Room", HERE, "surroundings.room:memory"),
    _check("disk", "disk", "Room", HERE, "surroundings.room:disk"),
    _check("shared-memory", "/dev/shm", "Room", HERE, "surroundings.system:shared_memory"),
    _check("open-files", "open files", "Room", HERE, "surroundings.system:open_files"),
    _check("encoding", "text encoding", "Room", HERE, "surroundings.system:encoding"),
    _check("clock", "clock", "Room", HERE, "surroundings.system:clock"),
    _check("settings", "environment", "Room", HERE, "surroundings.system:settings"),
    _check("gloo", "gloo", "Several processes", "ranks", "contact.ranks:gloo", patience=IMPORT),
    _check("nccl", "NCCL", "Several processes", "ranks", "contact.ranks:nccl", patience=IMPORT),
    _check("hub", "Hub", "Network", "hub", "contact.hub:hub"),
)
"""Every check, in the order of the report and, within a lane, of the work.

Within the lane of torch the devices come before bitsandbytes, whose import touches them: see
``order_of_work``.
"""


def order_of_work(lane: str) -> list[Check]:
    """The checks of a lane, each behind what it needs."""
    waiting = [check for check in CHECKS if check.lane == lane]
    names = {check.name for check in waiting}
    ordered: list[Check] = []
    while waiting:
        done = {check.name for check in ordered}
        ready = next(c for c in waiting if not (set(c.needs) & names) - done)
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


BY_NAME = {check.name: check for check in CHECKS}
