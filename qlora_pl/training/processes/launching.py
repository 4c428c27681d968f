"""``Launch``: who started the processes of a run, and whether the trainer's numbers say the same.

``torchrun``, ``srun`` and Kubernetes start every process themselves and tell each its place through
variables of the environment. Without them one process is started, and Lightning starts the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from qlora_pl.errors import ConfigurationError
from qlora_pl.training.run_folders.run_folder import FOLDER_VARIABLE

Launcher = Literal["torchrun", "srun", "RANK and WORLD_SIZE"]

OTHER_LAUNCHERS = {
    "mpirun": "OMPI_COMM_WORLD_SIZE",
    "mpiexec": "PMI_SIZE",
    "jsrun": "JSM_NAMESPACE_SIZE",
}
STARTS_MORE = {
    "torchrun": ("--nproc-per-node", "--nnodes"),
    "srun": ("--ntasks-per-node", "--nodes"),
}
"""The flags of a launcher for processes on a node, and for nodes."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of this process among those that were started."""

    launcher: Launcher | None = None
    """None: a user started this process alone, or Lightning did for a further device."""
    rank: int = 0
    """Among all processes, from 0."""
    num_processes: int = 1
    num_local: int = 1
    """Processes on this node."""
    num_nodes: int = 1
    has_local_rank: bool = True
    is_child: bool = False
    """Whether Lightning started it, for a further device of this machine."""
    problem: str | None = None
    """Why nothing can be started so, in a sentence."""

    @classmethod
    def detect(cls, variables: Mapping[str, str] = os.environ) -> Launch:
        """Read the place from the environment."""
        if "TORCHELASTIC_RUN_ID" in variables:
            return _by_torchrun(variables)
        is_handed_over = FOLDER_VARIABLE in variables or "RANK" not in variables
        if "LOCAL_RANK" in variables and is_handed_over:
            return cls(is_child=True, rank=int(variables["LOCAL_RANK"]))
        if "SLURM_STEP_ID" in variables and not _is_interactive(variables):
            return _by_srun(variables)
        if int(variables.get("WORLD_SIZE", "1")) > 1:
            return _by_variables(variables)
        return cls(problem=_half_started(variables))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that chooses the folder, and speaks for all."""
        return self.rank == 0 and not self.is_child

    def environment(self) -> ClusterEnvironment:
        """What Lightning reads a process's place from; named, so that it does not guess."""
        if self.launcher is None:
            return LightningEnvironment()
        if self.launcher == "srun":
            # Lightning insists on the variable, which SLURM sets only where the flag was given.
            os.environ["SLURM_NTASKS_PER_NODE"] = str(self.num_local)
            # Its own requeueing writes a checkpoint in the middle of a step, and swallows SIGTERM.
            return SLURMEnvironment(auto_requeue=False)
        return TorchElasticEnvironment() if self.has_local_rank else KubeflowEnvironment()

    def trainer_settings(self, trainer: Any) -> dict[str, Any]:
        """The trainer's settings that the launcher has decided; ``auto`` is what was started.

        Raises:
            ConfigurationError: if a plugin stands for another launcher.
        """
        plugins = _listed(trainer.plugins)
        for plugin in plugins:
            if isinstance(plugin, ClusterEnvironment):
                raise ConfigurationError(
                    f"trainer.plugins: {type(plugin).__name__} is not needed, the launcher is "
                    "recognised by itself; remove it."
                )
        chosen: dict[str, Any] = {"plugins": [self.environment(), *plugins]}
        if self.launcher is not None:
            chosen["num_nodes"] = self.num_nodes
            if trainer.devices in ("auto", -1, "-1"):
                chosen["devices"] = self.num_local
        return chosen

    def problems(self, trainer: Any) -> Iterator[str]:
        """Everything in which the trainer's settings contradict what was started."""
        if self.problem is not None:
            yield self.problem
        elif self.launcher is None:
            if trainer.num_nodes > 1 and not self.is_child:
                yield (
                    f"trainer.num_nodes: {trainer.num_nodes}, but this process was started alone; "
                    "start one for every GPU of every node, with torchrun or srun."
                )
        else:
            yield from self._mismatches(trainer)

    def _mismatches(self, trainer: Any) -> Iterator[str]:
        devices = number_of_devices(trainer.devices)
        per_node, nodes = STARTS_MORE.get(str(self.launcher), ("torchrun in each pod", "more pods"))
        if devices not in (None, self.num_local):
            yield (
                f"trainer.devices: {trainer.devices}, but {self._started(self.num_local)} on this "
                f"node; set it to auto, or start {devices} there ({per_node})."
            )
        if trainer.num_nodes not in (1, self.num_nodes):
            yield (
                f"trainer.num_nodes: {trainer.num_nodes}, but {self._started(self.num_processes)} "
                f"on {self.num_nodes} node{'s' * (self.num_nodes != 1)}; leave it out, or start "
                f"on as many ({nodes})."
            )
        visible = torch.cuda.device_count() if trainer.accelerator != "cpu" else 0
        if 0 < visible < self.num_local and self.has_local_rank:
            yield (
                f"This process sees {visible} of the GPUs of its node, where "
                f"{self._started(self.num_local)}; let each see all of them (no --gpus-per-task, "
                "--gpu-bind or CUDA_VISIBLE_DEVICES of its own)."
            )

    def _started(self, number: int) -> str:
        if self.launcher == "RANK and WORLD_SIZE":
            return f"RANK and WORLD_SIZE mean {number} process{'es' * (number != 1)}"
        return f"{self.launcher} started {number} process{'es' * (number != 1)}"


def number_of_devices(devices: Any) -> int | None:
    """How many devices ``trainer.devices`` means; None: as many as there are."""
    if devices in ("auto", -1, "-1"):
        return None
    if isinstance(devices, str) and "," in devices:
        return sum(bool(part.strip()) for part in devices.split(","))
    return len(devices) if isinstance(devices, list | tuple) else int(devices)


def meeting_point() -> tuple[str, int]:
    """Host and port at which the processes of a launch find each other, from the environment.

    For SLURM they are set here: the first node of the step, and a port that follows from job and
    step, so that two steps of a job do not meet.
    """
    if "SLURM_STEP_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
        number = 31 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
        root = SLURMEnvironment.resolve_root_node_address(nodes)
        os.environ.setdefault("MASTER_ADDR", root)
        os.environ.setdefault("MASTER_PORT", str(15000 + number % 10000))
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _by_torchrun(variables: Mapping[str, str]) -> Launch:
    number, local, nodes = (
        int(variables[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    )
    return Launch(
        launcher="torchrun",
        rank=int(variables["RANK"]),
        num_processes=number,
        num_local=local,
        num_nodes=nodes,
        problem=_uneven(number, local, nodes, "--nproc-per-node"),
    )


def _by_srun(variables: Mapping[str, str]) -> Launch:
    number, nodes = (int(variables[f"SLURM_STEP_NUM_{what}"]) for what in ("TASKS", "NODES"))
    if number == 1:
        return Launch()
    per_node = tasks_per_node(variables["SLURM_STEP_TASKS_PER_NODE"])
    local = per_node[int(variables["SLURM_NODEID"])]
    return Launch(
        launcher="srun",
        rank=int(variables["SLURM_PROCID"]),
        num_processes=number,
        num_local=local,
        num_nodes=nodes,
        problem=_uneven(number, max(per_node), nodes, "--ntasks-per-node"),
    )


def _by_variables(variables: Mapping[str, str]) -> Launch:
    number = int(variables["WORLD_SIZE"])
    needed = ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    if has_local_rank := "LOCAL_RANK" in variables:
        needed.append("LOCAL_WORLD_SIZE")
    if missing := [name for name in needed if name not in variables]:
        return Launch(
            problem=f"WORLD_SIZE is {number}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; start the processes with torchrun or "
            "srun, or unset WORLD_SIZE to start this one alone."
        )
    local = int(variables["LOCAL_WORLD_SIZE"]) if has_local_rank else 1
    return Launch(
        launcher="RANK and WORLD_SIZE",
        rank=int(variables["RANK"]),
        num_processes=number,
        num_local=local,
        num_nodes=number // local,
        has_local_rank=has_local_rank,
        problem=_uneven(number, local, number // local, "LOCAL_WORLD_SIZE"),
    )


def _half_started(variables: Mapping[str, str]) -> str | None:
    """Several processes were wanted, but none of them knows of the others."""
    tasks = int(variables.get("SLURM_NTASKS", "1"))
    if tasks > 1 and "SLURM_STEP_ID" not in variables and not _is_interactive(variables):
        return (
            f"The SLURM job has {tasks} tasks, but this command was started once; write srun in "
            "front of it."
        )
    for launcher, name in OTHER_LAUNCHERS.items():
        if int(variables.get(name, "1")) > 1:
            return (
                f"{name} says that {launcher} started {variables[name]} processes, each of which "
                "would train alone; start them with torchrun or srun."
            )
    return None


def tasks_per_node(text: str) -> list[int]:
    """SLURM's way of writing it: ``2(x3),1`` is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _uneven(number: int, local: int, nodes: int, flag: str) -> str | None:
    if number == local * nodes:
        return None
    return (
        f"{number} processes do not spread evenly over {nodes} nodes, one of which has {local}; "
        f"start as many on each ({flag})."
    )


def _is_interactive(variables: Mapping[str, str]) -> bool:
    """A shell that ``srun --pty`` opened, by the names of such a job."""
    return variables.get("SLURM_JOB_NAME") in ("bash", "interactive")


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    return list(plugins) if isinstance(plugins, list | tuple) else [plugins]
