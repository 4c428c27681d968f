"""Whether the allocator of CUDA memory lets its segments grow, as a run asks it to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qlora_pl.allocator import EXPANDABLE, obeyed_variable, set_by_user
from qlora_pl.doctor.finding import Finding, Status

TITLE = "allocator"


def allocator() -> Iterator[Finding]:
    """Ask the allocator itself, in a process whose environment was made as a run's is."""
    if not torch.cuda.is_available():
        yield Finding(
            title=TITLE,
            status=Status.NOTE,
            found="not asked: there is no GPU that torch can use",
            meaning="on CUDA a run lets segments grow, and logs memory/reserved_over_allocated",
        )
        return
    torch.zeros(1, device="cuda")
    snapshot: dict[str, Any] = torch.cuda.memory._snapshot()
    grow = snapshot.get("allocator_settings", {}).get("expandable_segments")
    yield of_segments(grow, os.environ, obeyed_variable())


def of_segments(grow: bool | None, variables: Mapping[str, str], obeyed: str) -> Finding:
    """What follows from the allocator's answer.

    Args:
        grow: Whether segments grow; None where this torch does not say.
        variables: The environment.
        obeyed: The variable that this torch obeys.
    """
    given = {name: variables[name] for name in set_by_user(variables)}
    shown = ", ".join(f"{name}={value}" for name, value in given.items()) or "nothing is set"
    if grow or (grow is None and EXPANDABLE in given.get(obeyed, "")):
        return Finding(
            title=TITLE,
            status=Status.OK,
            found=f"segments grow ({shown})",
            meaning="batches of ever other lengths leave few holes; memory/reserved_over_allocated "
            "in metrics.csv says how many",
        )
    holes = "batches of ever other lengths leave holes, and memory runs out while some is free"
    if EXPANDABLE in given.get(obeyed, ""):
        status, end, fix = Status.WARNING, ": this GPU or its driver cannot do it", ""
    elif any(EXPANDABLE in value for value in given.values()):
        status, end, fix = Status.WARNING, f": this torch obeys {obeyed}", _export(obeyed)
    else:
        status, end = Status.NOTE, ""
        fix = f"unset {' '.join(given)}" if given else _export(obeyed)
    return Finding(
        title=TITLE,
        status=status,
        found=f"segments do not grow ({shown}{end})",
        meaning=holes,
        fix=fix,
    )


def _export(variable: str) -> str:
    return f"export {variable}={EXPANDABLE}"
