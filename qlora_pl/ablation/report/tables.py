"""A grid's numbers as tables of plain text, for the page, for Markdown and for other programs."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Sequence
from typing import Any

from qlora_pl.ablation.report.numbers import CellNumbers, GridNumbers
from qlora_pl.ablation.statistics.differences import Interval
from qlora_pl.inspection.markdown import Cells


def cells_table(found: GridNumbers) -> Cells:
    """Every cell: its seeds, its mean with a single interval, memory and time."""
    metric, level = found.grid.file.metric, found.grid.file.level
    head = [
        "cell",
        f"#{metric.name} ({metric.unit})",
        f"#single {level:.0%} interval",
        "#seeds",
        *(f"#seed {seed}" for seed in found.grid.file.seeds),
        "#peak GiB",
        "#minutes",
    ]
    return Cells(head, [_cell(found, one) for one in found.cells]).without_empty()


def _cell(found: GridNumbers, one: CellNumbers) -> list[str]:
    return [
        one.name,
        shown(one.mean),
        interval_words(one.interval),
        str(len(one.values)),
        *(shown(one.values.get(seed)) for seed in found.grid.file.seeds),
        "" if one.memory_gib is None else f"{one.memory_gib:.2f}",
        "" if one.minutes is None else f"{one.minutes:.1f}",
    ]


def differences_table(found: GridNumbers) -> Cells:
    """Every comparison that was asked for."""
    level = found.grid.file.level
    head = [
        "cell",
        "reference",
        "#difference",
        f"#single {level:.0%}",
        f"#simultaneous {level:.0%}",
        "#Holm's p",
        "#effect size",
        "differs",
    ]
    words = {True: "yes", False: "not shown", None: "cannot be said"}
    rows = [
        [
            one.cell,
            one.reference,
            shown(one.mean if one.values else None, "+"),
            interval_words(one.single),
            interval_words(one.simultaneous),
            "" if one.p_holm is None else f"{one.p_holm:.3g}",
            "" if one.effect_size is None else f"{one.effect_size:+.2f}",
            words[one.differs(level)],
        ]
        for one in found.differences
    ]
    return Cells(head, rows).without_empty()


def failed_table(found: GridNumbers) -> Cells:
    """Runs without a value, and why."""
    rows = [
        [run.entry.name, run.state.kind, str(run.state.attempts), run.why_not or ""]
        for run in found.failed
    ]
    return Cells(["run", "state", "#attempts", "why"], rows)


def settings_table(found: GridNumbers) -> Cells:
    """Each cell's keys where it is not as the base."""
    keys = list(dict.fromkeys(key for cell in found.grid.cells for key in cell.settings))
    rows = [
        [cell.name, *(json.dumps(cell.settings[k]) if k in cell.settings else "" for k in keys)]
        for cell in found.grid.cells
    ]
    return Cells(["cell", *keys], rows)


def commands(found: GridNumbers) -> list[str]:
    """The command of each run that alone gives the same result."""
    return [f"qlora-pl fit {shlex.join(run.entry.words)}" for run in found.runs]


def as_csv(found: GridNumbers) -> str:
    """A line for each run: levels, seed, state, every number of its metrics."""
    rows = plain_rows(found)
    head = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plain_rows(found: GridNumbers) -> list[dict[str, Any]]:
    """The same as mappings; what is no number of the run's outcome is left out."""
    rows = []
    for run in found.runs:
        row: dict[str, Any] = {
            "cell": run.entry.cell,
            **run.entry.levels,
            "seed": run.entry.seed,
            "state": run.state.kind,
            "identity": run.entry.identity,
            "code": " ".join(run.state.codes),
        }
        for key, value in run.metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                row[key] = value
        rows.append(row)
    return rows


def plain(found: GridNumbers, said: Sequence[str]) -> dict[str, Any]:
    """Everything for other programs."""
    return {
        "question": found.grid.file.question,
        "metric": vars(found.grid.file.metric),
        "level": found.grid.file.level,
        "sentences": list(said),
        "cells": [vars(one) for one in found.cells],
        "differences": [
            {**vars(one), "differs": one.differs(found.grid.file.level)}
            for one in found.differences
        ],
        "equivalences": [
            {
                "cell": one.difference.cell,
                "reference": one.difference.reference,
                "margin": one.margin,
                "p": one.p,
                "p_corrected": one.p_corrected,
                "holds": one.holds(found.grid.file.level),
            }
            for one in found.equivalences
        ],
        "trends": [vars(one) for one in found.trends],
        "codes": list(found.codes),
        "runs": plain_rows(found),
        "failed": [
            {"run": run.entry.name, "state": run.state.kind, "why": run.why_not}
            for run in found.failed
        ],
    }


def shown(value: float | None, sign: str = "") -> str:
    """A metric's value, four digits after the point; nothing for none."""
    return "" if value is None else f"{value:{sign}.4f}"


def interval_words(interval: Interval | None) -> str:
    """An interval, or nothing."""
    return "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
