"""A real shortage of memory in a step, and what a step takes against what was planned."""

from __future__ import annotations

import csv
from typing import Any

from gpu.layouts import ADAPTER, LOSS
from gpu.place import Findings, Place
from gpu.runs import Run, adapter_distance, complete, finish, merge, step_distance
from gpu.speed import TOKENS_OF_ROW, large_run

ROWS = 8
STEP = 2
"""In which memory is short; the optimizer has its state by then."""
SHARE = 0.75
"""Of what a step takes besides what is held: too little for it, enough for half of its rows."""
MOST_APART = 0.05
"""What a run's peak may be from its plan, as a share of the peak."""
PLANNED: dict[str, dict[str, Any]] = {
    "recomputing": {},
    "keeping": {"model": {"gradient_checkpointing": False}},
    "half": {
        "model": {"gradient_checkpointing": False, "lora": {"dtype": "bfloat16", "dropout": 0.1}}
    },
    "accumulating": {
        "model": {"optimizer": {"name": "adamw_8bit"}},
        "data": {"batch_size": 1},
    },
}
"""Settings whose plans have different largest parts."""
GIVEN_GIB = 8.0
"""What a run may take that chooses its own micro-batch: too little for all of a step's rows."""
MOST_OVER_PLAN = 1.15
"""A step may take so much of what was estimated: the choice of a strategy leaves 8 % free."""


def shortage(place: Place, findings: Findings) -> None:
    """The allocator is allowed less than a step takes: split, and stop."""
    free = _batch_run(place, "enough-memory")
    complete(free)
    cap: dict[str, Any] = {"step": STEP, "rehearsed_rows": ROWS}
    if not place.is_rehearsal:
        step = next(step for step in free.notes()["steps"] if step["step"] == STEP)
        held, peak = step["held_bytes"], step["peak_bytes"]
        cap["num_bytes"] = int(held + SHARE * (peak - held))
        findings.note(held_bytes=held, peak_bytes=peak, allowed_bytes=cap["num_bytes"])
    callback = {"class_path": "gpu.notes.MemoryCap", "init_args": cap}
    split = _batch_run(place, "short-of-memory", callback)
    stop = _batch_run(place, "short-and-stopped", callback, on_oom="stop")
    codes = finish(split, stop)
    if any(codes[0]):
        raise RuntimeError(split.failure(codes[0]))
    metrics = split.metrics()
    counts = {name: metrics[name] for name in ("out_of_memory_splits", "micro_batch_pieces")}
    findings.claim(
        "split: memory ran out in a step, and the run went on in pieces",
        counts["out_of_memory_splits"] >= 1 and counts["micro_batch_pieces"] in (2, 4),
        **counts,
    )
    apart = adapter_distance(split, free)
    gap = step_distance(split, free, "loss")
    findings.claim(
        "split: the adapter is that of the run with enough memory",
        apart["relative_difference"] <= ADAPTER and gap <= LOSS,
        **apart,
        loss_difference=gap,
    )
    said = " ".join(stop.said.split())
    findings.claim(
        "stop: the run ends with exit code 1 and names the micro-batch to set",
        codes[1] == [1] and f"set data.batch_size: {ROWS // 2}" in said,
        exit_code=codes[1][0],
        said=stop.said.strip()[-300:],
    )


def _batch_run(
    place: Place, name: str, callback: dict[str, Any] | None = None, on_oom: str = "split"
) -> Run:
    """Eight rows a micro-batch, whose activations are most of what a step takes."""
    return Run(
        place,
        name,
        model={
            "on_oom": on_oom,
            "gradient_checkpointing": False,
            "optimizer": {"name": "adamw_32bit"},
        },
        data={"packing": False, "batch_size": ROWS, "global_batch_size": ROWS},
        trainer={"callbacks": [callback] if callback else []},
    )


def plan(place: Place, findings: Findings) -> None:
    """A step of the large base against the plan that chooses strategies."""
    from qlora_pl.modeling.base.quantization_plan import build_skeleton
    from qlora_pl.planning.memory.memory_plan import TrainingSetting, plan_memory
    from qlora_pl.planning.shapes.model_shape import shape_of_skeleton

    run = large_run(place, "large-quantised-now")
    complete(run)
    notes, model, data = run.notes(), run.config["model"], run.config["data"]
    lora = model["lora"]
    setting = TrainingSetting(
        quant_type=model["quantization"].get("quant_type", "nf4"),
        r=lora.get("r", 64),
        adapter_dtype=lora.get("dtype", "float32"),
        dropout=lora.get("dropout", 0.0),
        optimizer=model["optimizer"].get("name", "paged_adamw_32bit"),
        batch_size=data["batch_size"],
        tokens_per_row=TOKENS_OF_ROW,
    )
    planned = plan_memory(shape_of_skeleton(build_skeleton(model["model_name_or_path"])), setting)
    sizes = notes["base_bytes"]
    findings.note(
        measured=sizes,
        planned=planned.components,
    )
    findings.claim(
        "packed weights take half a byte each",
        2 * sizes["packed"] == sizes["packed_weights"],
        num_bytes=sizes["packed"],
    )
    parts = ("packed_weights", "embeddings_and_head", "norms_and_other")
    expected = sum(planned.components[part] for part in parts)
    held = sizes["packed"] + sizes["unquantised"]
    findings.claim(
        "the base takes what was planned, to a thousandth",
        abs(held / expected - 1) <= 1e-3,
        ratio=held / expected,
    )
    text = "a step takes no more than what was planned and 15 %"
    if place.is_rehearsal:
        findings.needs_cuda(text)
        return
    peak = max(step["peak_bytes"] for step in notes["steps"])
    ratio = peak / planned.allocated
    findings.claim(text, ratio <= MOST_OVER_PLAN, ratio=ratio, peak_bytes=peak)


def peaks(place: Place, findings: Findings) -> None:
    """Runs of a few settings and their own lines in ``plan_error.csv``; one chooses its batch."""
    runs = {name: _two_steps(place, f"peak-{name}", changes) for name, changes in PLANNED.items()}
    for name, run in runs.items():
        complete(run)
        row = _line_of(run)
        parts = [key.removeprefix("counted_") for key in row if key.startswith("counted_")]
        apart = {part: int(row[f"counted_{part}"]) - int(row[f"planned_{part}"]) for part in parts}
        findings.claim(f"{name}: what is counted is what was planned", not any(apart.values()))
        text = f"{name}: the peak is within {MOST_APART:.0%} of its plan"
        findings.note(**{name: {key: value for key, value in row.items() if value}})
        if place.is_rehearsal:
            findings.needs_cuda(text)
        else:
            ratio = float(row["error_ratio"])
            findings.claim(text, abs(ratio) <= MOST_APART, ratio=ratio)
    _chosen_batch(place, findings)


def _chosen_batch(place: Place, findings: Findings) -> None:
    chosen = {
        "run": {"memory_gib": GIVEN_GIB},
        "model": {"gradient_checkpointing": "auto"},
        "data": {"batch_size": "auto", "global_batch_size": 2 * ROWS},
    }
    run = _two_steps(place, "peak-auto", chosen)
    complete(run)
    row, told = _line_of(run), " ".join(run.said.split())
    findings.claim(
        "auto: a size was chosen that divides the step, and said in a sentence",
        2 * ROWS % int(row["batch_size"]) == 0 and told.count("(auto), planned to take") == 1,
        batch_size=int(row["batch_size"]),
        gradient_checkpointing=row["gradient_checkpointing"],
    )
    text = "auto: the run took no more than it was given"
    if place.is_rehearsal:
        findings.needs_cuda(text)
        return
    peak = int(row["peak_allocated"])
    findings.claim(text, peak <= GIVEN_GIB * 2**30, peak_bytes=peak, reserved=row["peak_reserved"])


def _two_steps(place: Place, name: str, changes: dict[str, Any]) -> Run:
    """Of the large base, without notes: they begin to count peaks anew at each step."""
    run = large_run(place, name)
    merge(run.config, changes)
    run.config["trainer"] |= {"max_steps": 2, "callbacks": []}
    return run


def _line_of(run: Run) -> dict[str, str]:
    with (run.folder.parent.parent / "plan_error.csv").open(newline="") as table:
        return next(row for row in csv.DictReader(table) if row["run"] == str(run.folder))
