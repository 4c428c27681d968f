"""One run under every layout, and runs that begin under one and go on under another.

Losses, gradient norms, the adapter, and the base's bytes before and after; NCCL with one process,
gloo with two on the same GPU.
"""

from __future__ import annotations

from typing import Any

from gpu.place import Findings, Place
from gpu.runs import (
    DDP,
    FSDP2,
    GLOO,
    MIDDLE,
    STEPS,
    Run,
    adapter_distance,
    complete,
    step_distance,
)

STRATEGIES: dict[str, Any] = {
    "one": "auto",
    "fsdp2 alone": "fsdp2",
    "ddp": {"class_path": DDP, "init_args": GLOO},
    "fsdp2": {"class_path": FSDP2, "init_args": GLOO},
    "fsdp2 offloaded": {"class_path": FSDP2, "init_args": GLOO | {"cpu_offload": True}},
}
ON_TWO = ("ddp", "fsdp2", "fsdp2 offloaded")
LOSS, NORM, ADAPTER = 1e-5, 1e-4, 1e-3
"""Relative bounds. Float32 sums in other orders move losses and norms by some 1e-7 and 1e-6; AdamW
makes up to lr of a gradient that is next to nothing, so single elements may be far apart, and the
norm over all of them is judged."""
OTHER_CONSTANTS = {"loss": 5e-3, "adapter": 0.2}
"""The same where a CPU goes on from a GPU's run or the reverse: 0.2 % of the constants differ."""


def layout(place: Place, name: str) -> Run:
    """The whole run under a layout; the same object of work for every check."""
    return Run(
        place,
        name.replace(" ", "-"),
        num_ranks=2 if name in ON_TWO else 1,
        trainer={"strategy": STRATEGIES[name]},
    )


def nccl(place: Place, findings: Findings) -> None:
    """FSDP2 as a single process, with what NCCL and ``fully_shard`` do on a GPU."""
    one, alone = layout(place, "one"), layout(place, "fsdp2 alone")
    complete(one, alone)
    backend = "gloo" if place.is_rehearsal else "nccl"
    findings.note(backend=backend)
    hold_base(findings, one, one)
    hold_against(findings, alone, one)


def two_ranks(place: Place, findings: Findings) -> None:
    """Two ranks on one device, against one process with the same global batches."""
    one, *others = (layout(place, name) for name in ("one", *ON_TWO))
    complete(one, *others)
    for run in others:
        hold_against(findings, run, one)


def moves(place: Place, findings: Findings) -> None:
    """From the middle of a run on, under another layout, on another kind of device."""
    one, cut = layout(place, "one"), layout(place, "fsdp2")
    on_cpu = Run(
        place,
        "cpu-begun",
        trainer={"accelerator": "cpu", "strategy": "auto", "max_steps": MIDDLE + 1},  # branches off
    )
    complete(one, cut, on_cpu)
    begun = {"one": one, "fsdp2": cut, "cpu": on_cpu}
    moved = [
        _move(place, "fsdp2", "one", begun, {}),
        _move(place, "fsdp2", "cpu", begun, {"accelerator": "cpu"}),
        _move(place, "one", "fsdp2", begun, {"strategy": STRATEGIES["fsdp2"]}, num_ranks=2),
        _move(place, "cpu", "fsdp2", begun, {"strategy": STRATEGIES["fsdp2"]}, num_ranks=2),
    ]
    complete(*moved)
    for run in moved:
        changes_kind = "cpu" in run.name and not place.is_rehearsal
        loss = OTHER_CONSTANTS["loss"] if changes_kind else LOSS
        adapter = OTHER_CONSTANTS["adapter"] if changes_kind else ADAPTER
        hold_numbers(findings, run, one, loss, adapter, first_step=MIDDLE + 1)


def _move(
    place: Place,
    source: str,
    target: str,
    begun: dict[str, Run],
    trainer: dict[str, Any],
    num_ranks: int = 1,
) -> Run:
    return Run(
        place,
        f"{source}-to-{target}",
        num_ranks=num_ranks,
        words=["--ckpt_path", str(begun[source].checkpoint(MIDDLE))],
        trainer=trainer,
    )


def hold_against(findings: Findings, run: Run, one: Run) -> None:
    """Every number and byte of a whole run against the single process."""
    hold_numbers(findings, run, one, LOSS, ADAPTER)
    gap = step_distance(run, one, "norm")
    findings.claim(
        f"{run.name}: gradient norms are the single process's",
        gap <= NORM,
        relative_difference=gap,
        bound=NORM,
    )
    hold_base(findings, run, one)


def hold_numbers(
    findings: Findings, run: Run, one: Run, loss: float, adapter: float, first_step: int = 1
) -> None:
    """Losses of the steps that it took, and the finished adapter."""
    steps = run.notes()["steps"]
    findings.note(**{run.name: {key: [s[key] for s in steps] for key in ("step", "loss", "norm")}})
    gap = step_distance(run, one, "loss", first_step)
    findings.claim(
        f"{run.name}: losses of steps {first_step} to {STEPS} are the single process's",
        gap <= loss,
        relative_difference=gap,
        bound=loss,
    )
    apart = adapter_distance(run, one)
    findings.claim(
        f"{run.name}: the adapter is the single process's",
        apart["relative_difference"] <= adapter,
        **apart,
        bound=adapter,
    )


def hold_base(findings: Findings, run: Run, one: Run) -> None:
    """The base's bytes: on every rank, before the first step and after the last."""
    notes = [run.notes(rank) for rank in range(run.num_ranks)]
    digests = {note[when] for note in notes for when in ("packed_before", "packed_after")}
    expected = one.notes()["packed_before"]
    findings.claim(
        f"{run.name}: packed bytes are the single process's on every rank, before and after",
        digests == {expected},
        sha256=sorted(digests),
    )
    types = {kind for note in notes for kind in note["packed_types"]}
    findings.claim(f"{run.name}: packed weights are uint8", types == {"torch.uint8"})
    checksum = run.base_checksum()
    findings.claim(
        f"{run.name}: the checkpoint's checksum of the base is the single process's",
        checksum == one.base_checksum(),
        checksum=checksum,
    )
