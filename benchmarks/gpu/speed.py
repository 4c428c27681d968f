"""Seconds: of a step and of loading a base of 1.3e9 weights, of a save, of leaving on SIGTERM."""

from __future__ import annotations

import statistics
from typing import Any

import saving
from synthetic import write_rows

from gpu.place import Findings, Place
from gpu.runs import Run, complete

TOKENS_OF_ROW = 512
STEPS_OF_SPEED = 10
WARM_AFTER = 3
"""Steps before which kernels are chosen and memory is first taken."""


def large_run(place: Place, name: str) -> Run:
    """NF4 with double quantisation in bfloat16, rank 64 on all linear layers, 4 rows a step."""
    rows = place.folder / "long-rows.jsonl"
    if not rows.is_file():
        write_rows(rows, 4 * STEPS_OF_SPEED + 8, TOKENS_OF_ROW)
    return Run(
        place,
        name,
        cache="large",
        model={
            "model_name_or_path": str(place.base("large")),
            "quantization": {"compute_dtype": "bfloat16"},
            "lora": {"r": 64},
            "optimizer": {"lr": 1e-4},
        },
        data={
            "sources": str(rows),
            "max_length": TOKENS_OF_ROW,
            "packing": False,
            "batch_size": 4,
            "global_batch_size": 4,
        },
        checkpoint={"every_n_steps": 100},
        trainer={"max_steps": STEPS_OF_SPEED if not place.is_rehearsal else WARM_AFTER + 2},
    )


def speed(place: Place, findings: Findings) -> None:
    """One run that quantises, one that reads the packed copy, and one that is stopped."""
    now, again = (large_run(place, f"large-{kind}") for kind in ("quantised-now", "from-the-copy"))
    complete(now)
    complete(again)
    findings.claim(
        "a base from the packed copy has the bytes of the one that was quantised now",
        again.notes()["packed_after"] == now.notes()["packed_before"],
        sha256=now.notes()["packed_before"],
    )
    notes = again.notes()
    steps = [step for step in notes["steps"] if step["step"] > WARM_AFTER]
    seconds = [step["seconds"] for step in steps]
    tokens = [step["tokens"] for step in steps]
    findings.note(
        weights=notes["base_bytes"]["packed_weights"],
        tokens_a_step=statistics.median(tokens),
        seconds_a_step=statistics.median(seconds),
        shortest_and_longest_step=[min(seconds), max(seconds)],
        tokens_per_second=sum(tokens) / sum(seconds),
        peak_bytes=max((step["peak_bytes"] or 0 for step in steps), default=0),
        loading_quantised_now_seconds=now.notes()["loading_seconds"],
        loading_from_the_copy_seconds=notes["loading_seconds"],
        loading_peak_bytes=now.notes()["loading_peak_bytes"],
    )
    _leaving(place, findings)


def _leaving(place: Place, findings: Findings) -> None:
    folder = place.folder / "saving"
    folder.mkdir(exist_ok=True)
    if not (folder / "base").exists():
        (folder / "base").symlink_to(place.base())
    write_rows(folder / "rows.jsonl", 256, 64)
    found: dict[str, Any] = saving.measure(folder, "one", 1, 64, place.accelerator)
    findings.note(saving=found)
    findings.claim(
        "SIGTERM saves and ends with exit code 143 within 20 s",
        found["exit_codes"] == [[143]] * 2 and max(found["sigterm_to_exit_seconds"]) <= 20,
        seconds=found["sigterm_to_exit_seconds"],
    )
    findings.claim(
        "the same command goes on at the step that was saved",
        found["resumed_at_step"] >= saving.STOPPED_AFTER,
        step=found["resumed_at_step"],
    )
