"""A record of a benchmark -> the lines that are printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
WORTH_A_LINE = 0.01
"""Share of the timed steps."""


def report(record: Record) -> str:
    """What was measured, in a screen of text."""
    speed, compute = record["speed"], record["compute"]
    step, repeats = speed["step_seconds"], record["timing"]["repeats"]
    lines = [
        f"bench: {title(record)}",
        f"  {record['environment']['device']}, {record['environment']['date']}",
        "",
        _row("tokens/s", f"{speed['tokens_per_second']:,.1f} without padding"),
        _row("", f"{speed['trained_tokens_per_second']:,.1f} trained"),
        _row(
            "",
            f"{speed['padded_tokens_per_second']:,.1f} with padding "
            f"({speed['padding_ratio']:.1%} of what is computed)",
        ),
        _row("samples/s", f"{speed['samples_per_second']:,.2f}"),
        _row(
            "step",
            f"{seconds(step['median'])} median, {seconds(step['p90'])} p90, of "
            f"{speed['tokens_per_step']:,.0f} tokens",
        ),
    ]
    if repeats > 1:
        lines.append(_row("repeats", f"within a factor of {speed['spread_of_repeats']:.3f}"))
    lines += _utilisation(record, compute)
    lines += _memory(record["memory"])
    lines += [
        _row("set-up", f"{seconds(record['setup_seconds'])}, first step "
             f"{seconds(record['first_step_seconds'])}"),
        _row("loss", _loss(record["loss"])),
    ]  # fmt: skip
    if record["parts"]:
        lines += ["", "  time by part, of a step under the profiler"]
        for name, value in record["parts"]["seconds"].items():
            share = record["parts"]["shares"][name]
            lines.append(f"    {name:15}{share:6.1%}  {seconds(value)}")
    if (read := record["reading_ratio"]) >= WORTH_A_LINE:
        lines.append(f"  of the timed steps {read:.1%} were reading of rows between epochs")
    lines += ["", f"bench: {record['advice']}"]
    return "\n".join([*lines, *warnings(record)])


def title(record: Record) -> str:
    """What was measured, in a line."""
    if "workload" not in record:
        return f"{' '.join(record['config']) or 'a run'}, {record['processes']} process(es)"
    work = record["workload"]
    how = "packed" if work["packing"] else "padded"
    return (
        f"{work['shape']}, {work['quant_type']}, rank {work['r']}, {work['tokens_per_micro']:,} "
        f"tokens in {how} lines of {work['seq']} x {work['accumulation']}, {work['lengths']} rows, "
        f"checkpointing {work['checkpointing']}, {work['optimizer']}"
    )


def warnings(record: Record) -> list[str]:
    """What speaks against quoting the figures."""
    found = []
    if problem := record["loss"].get("problem"):
        found.append(f"bench: do not quote this: {problem}.")
    if not record["timing"]["follows_protocol"]:
        found.append(
            "bench: fewer than 5 steps of warm-up or 20 timed ones: enough for a look, not for a "
            "figure."
        )
    if record["out_of_memory_splits"]:
        found.append(
            f"bench: {record['out_of_memory_splits']} micro-batches did not fit into memory and "
            "were split, so that later ones were slower."
        )
    return found


def seconds(value: float) -> str:
    """A time in the unit that fits it."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def gigabytes(value: float) -> str:
    """In powers of ten, as memory is sold."""
    return f"{value / 1e9:.2f} GB"


def _row(name: str, text: str) -> str:
    return f"  {name:11}{text}"


def _utilisation(record: Record, compute: Mapping[str, Any]) -> list[str]:
    peak = compute["peak_flops_per_second"]
    side, dtype = record["device_speed"]["square_side"], record["device_speed"]["dtype"]
    lines = [
        _row(
            "MFU",
            f"{compute['mfu']:.1%} of {peak / 1e12:.2f} TFLOP/s (a product of {side} x {side} in "
            f"{dtype}, just now)",
        ),
        _row("HFU", f"{compute['hfu']:.1%}; frozen base: 4 operations a weight and token, not 6"),
    ]
    if "mfu_of_data_sheet" in compute:
        sheet = compute["data_sheet_flops_per_second"]
        lines.append(
            _row(
                "",
                f"{compute['mfu_of_data_sheet']:.1%} and {compute['hfu_of_data_sheet']:.1%} of the "
                f"data sheet's {sheet / 1e12:.0f} TFLOP/s",
            )
        )
    return lines


def _memory(memory: Mapping[str, Any]) -> list[str]:
    lines = []
    for title, found in (("first step", "of_first_step"), ("afterwards", "of_timed_steps")):
        kinds = ("allocated", "reserved", "resident", "anonymous_now")
        shown = [
            f"{gigabytes(memory[found][k])} {k.replace('_', ' ')}"
            for k in kinds
            if k in memory[found]
        ]
        lines.append(_row("peak", f"{title}: {', '.join(shown)}"))
    if predicted := memory.get("predicted"):
        error = predicted["error_ratio"]
        apart = "" if error is None else f", {error:+.1%} of {gigabytes(predicted['measured'])}"
        lines.append(_row("planned", f"{gigabytes(predicted['bytes'])} {predicted['what']}{apart}"))
    return lines


def _loss(loss: Mapping[str, Any]) -> str:
    text = f"{loss['first']:.3f} at first, {loss['last']:.3f} at last"
    if "ln_vocabulary" in loss:
        text += f" (guessing: {loss['ln_vocabulary']:.3f})"
    return text
