"""Several processes of a run: whether they find each other and agree on a sum."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta

from qlora_pl.doctor.finding import Finding, Status
from qlora_pl.doctor.running.worker import program

TAKE_PART = "from qlora_pl.doctor.contact.ranks import take_part; take_part(sys.argv[2])"
SECONDS = 40


def gloo() -> Iterator[Finding | str]:
    """Two processes on the CPU."""
    yield "two processes"
    error = meet("gloo", 2)
    yield Finding(
        title="gloo",
        status=Status.WARNING if error else Status.OK,
        found=error or "two processes found each other and agree on a sum",
        meaning="runs on several devices do not start; those on one do"
        if error
        else "runs of several processes start here",
        fix="export GLOO_SOCKET_IFNAME=lo" if error else "",
    )


def nccl() -> Iterator[Finding | str]:
    """Two GPUs, where there are two."""
    import torch
    from torch import distributed

    count = torch.cuda.device_count()
    if count < 2:
        yield Finding(
            title="NCCL",
            status=Status.NOTE,
            found=f"not tried: there is {'one' if count else 'no'} GPU",
            meaning="it joins several GPUs; a run on one device needs none",
        )
        return
    if not distributed.is_nccl_available():
        error = "this torch was built without it"
    else:
        yield "two GPUs"
        error = meet("nccl", 2)
    yield Finding(
        title="NCCL",
        status=Status.WARNING if error else Status.OK,
        found=error or f"two of {count} GPUs found each other and agree on a sum",
        meaning="runs on several GPUs do not start; those on one do"
        if error
        else "runs on several GPUs start here",
        fix="NCCL_DEBUG=INFO NCCL_P2P_DISABLE=1 qlora-pl doctor" if error else "",
    )


def meet(backend: str, number: int) -> str:
    """Start processes that add their numbers; "" if they agree, else what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    processes = [
        subprocess.Popen(
            program(TAKE_PART, backend),
            env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for rank in range(number)
    ]
    problems = []
    for rank, process in enumerate(processes):
        try:
            said = process.communicate(timeout=SECONDS)[1]
        except subprocess.TimeoutExpired:
            problems.append(f"process {rank} waited {SECONDS} s in vain")
            continue
        if process.returncode:
            problems.append(_last_error(said) or f"process {rank} ended with {process.returncode}")
    for process in processes:
        process.kill()
    return problems[0] if problems else ""


def take_part(backend: str) -> None:
    """One of the processes: meet the others and add this one's number, counted from 1."""
    import torch
    from torch import distributed

    rank, number = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    distributed.init_process_group(
        backend,
        timeout=timedelta(seconds=SECONDS - 5),
        device_id=device if backend == "nccl" else None,
    )
    total = torch.tensor([rank + 1.0], device=device)
    distributed.all_reduce(total)
    if total.item() != number * (number + 1) / 2:
        sys.exit(f"RuntimeError: the sum is {total.item()}, not {number * (number + 1) / 2}")
    distributed.destroy_process_group()


def _last_error(said: str) -> str:
    """The last line of a traceback that names an error."""
    lines = [line.strip() for line in said.splitlines() if "Error" in line.partition(":")[0]]
    return lines[-1][:200] if lines else ""
