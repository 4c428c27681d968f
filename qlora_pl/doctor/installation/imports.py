"""Whether the libraries of a run import, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import import_module

from qlora_pl.doctor.finding import Finding, Status, first_line

LIBRARIES = {
    "transformers": "no base can be loaded",
    "peft": "no adapter can be trained",
    "lightning.pytorch": "no run starts",
    "datasets": "no rows can be read",
    "torchmetrics": "no run starts",
    "jsonargparse": "no configuration can be read",
    "torch.utils.tensorboard": "trainer.logger must be false, and no curves are drawn",
    "qlora_pl.cli": "no run starts",
}
"""In this order: what each stands upon comes before it."""
SLOW_SECONDS = 30.0


def imports() -> Iterator[Finding | str]:
    """Import each; a broken one says what fails without it."""
    began, broken = time.monotonic(), 0
    for name, consequence in LIBRARIES.items():
        yield name
        try:
            import_module(name)
        except Exception as error:
            broken += 1
            yield Finding(
                title=name,
                status=Status.BROKEN,
                found=first_line(error),
                meaning=consequence,
                fix="pip install --force-reinstall --no-deps --constraint constraints.txt "
                + name.partition(".")[0].replace("_", "-"),
            )
    seconds = time.monotonic() - began
    is_slow = seconds > SLOW_SECONDS
    if broken < len(LIBRARIES):
        yield Finding(
            title="libraries",
            status=Status.WARNING if is_slow else Status.OK,
            found=f"{len(LIBRARIES) - broken} of {len(LIBRARIES)} import, TensorBoard's writer "
            f"among them, in {seconds:.0f} s",
            meaning="every start takes that long; a busy machine or a network disk does it"
            if is_slow
            else "a run has what it imports",
        )
