"""Answers on a GPU: a row does not depend on its batch; tokens a second against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from inference_speed import OURS, Task, speed
from synthetic import save_adapter

from gpu.place import Findings, Place

NUM_PROMPTS, NUM_TOKENS = 32, 48
REHEARSED = 4


def answering(place: Place, findings: Findings) -> None:
    """A random adapter over a random base, in float32 for the claim and as it comes for seconds."""
    findings.note(float32=_speed(place, findings, "small", "float32"))
    findings.note(default=_speed(place, None, "large", None))


def _speed(place: Place, findings: Findings | None, size: str, compute: str | None) -> object:
    base = place.base(size)
    adapter = place.folder / f"adapter-{size}"
    if not adapter.is_dir():
        save_adapter(adapter, base)
    task = Task(
        adapter=adapter,
        base=str(base),
        num_prompts=REHEARSED if place.is_rehearsal else NUM_PROMPTS,
        num_tokens=REHEARSED if place.is_rehearsal else NUM_TOKENS,
        repeats=1 if place.is_rehearsal else 3,
    )
    with _computing_in(compute):
        found = speed(task, None, has_plain=compute is None)
    if findings is not None:
        for batch in found["batch_sizes"][1:]:
            parted = batch["against_alone"][OURS]
            findings.claim(
                f"in {compute} answers in batches of {batch['batch_size']} are those alone",
                parted["differ"] == 0,
                **parted,
            )
    return found


@contextmanager
def _computing_in(compute: str | None) -> Iterator[None]:
    """The dtype of products, which a plain PEFT folder does not name."""
    import torch

    from qlora_pl.modeling.loading import base_loading as loading

    own = loading.resolve_compute_dtype
    if compute is not None:
        loading.resolve_compute_dtype = lambda *_: getattr(torch, compute)
    try:
        yield
    finally:
        loading.resolve_compute_dtype = own
