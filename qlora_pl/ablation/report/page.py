"""A report: one page that needs nothing else, Markdown, CSV and JSON, made from results alone."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path

from qlora_pl import __version__
from qlora_pl.ablation.report.numbers import GridNumbers
from qlora_pl.ablation.report.pictures import cost, curves, forest
from qlora_pl.ablation.report.sentences import sentences
from qlora_pl.ablation.report.tables import (
    as_csv,
    cells_table,
    commands,
    differences_table,
    failed_table,
    plain,
    settings_table,
)
from qlora_pl.files import write_atomic
from qlora_pl.inspection.cells import bullets
from qlora_pl.inspection.pictures import heat_map
from qlora_pl.inspection.report_folder import as_json, whole_page

READING = (
    "Seeds are paired: the same seed means the same order of rows in every cell. <b>Single</b> "
    "intervals each cover their own value at the level stated; <b>simultaneous</b> ones "
    "(Bonferroni) cover all differences asked for at once. Cells <b>differ</b> where Holm's "
    "correction of paired t tests says so. <b>Not shown</b> is not the same as none."
)


def write_report(found: GridNumbers, folder: Path) -> Path:
    """Write all forms of a report.

    Args:
        found: See ``numbers.numbers_of``.
        folder: Of the grid.

    Returns:
        The page.
    """
    said = sentences(found)
    write_atomic(folder / "results.csv", as_csv(found))
    write_atomic(folder / "report.json", as_json(plain(found, said)) + "\n")
    write_atomic(folder / "report.md", markdown(found, said))
    write_atomic(folder / "report.html", page(found, said))
    return folder / "report.html"


def markdown(found: GridNumbers, said: list[str]) -> str:
    """The report without pictures."""
    parts = [f"# {found.grid.file.question}", "\n".join(f"- {one}" for one in said)]
    parts += ["## Cells", cells_table(found).markdown()]
    if found.differences:
        parts += ["## Paired differences", differences_table(found).markdown()]
    if found.failed:
        parts += ["## Runs without a value", failed_table(found).markdown()]
    parts += ["## What each cell sets", settings_table(found).markdown()]
    parts += ["## Commands", "```bash\n" + "\n".join(commands(found)) + "\n```"]
    parts.append(f"Code: {', '.join(found.codes) or 'unknown'}; qlora-pl {__version__}.")
    return "\n\n".join(parts) + "\n"


def page(found: GridNumbers, said: list[str]) -> str:
    """The report as one HTML page."""
    file = found.grid.file
    metric = f"{file.metric.name} ({file.metric.unit})"
    pictured = [one for one in found.differences if one.values]
    sections = {
        "answer": ("What the numbers allow to be said", bullets(map(escape, said))),
        "cells": (
            "Cells",
            f"<p class='note'>{READING}</p>{cells_table(found).html()}{_map(found)}",
        ),
        "differences": (
            f"Differences from {found.grid.reference}"
            if found.grid.reference
            else "Paired differences",
            forest(pictured, file.metric.unit, file.metric.better, file.level)
            + differences_table(found).html()
            if pictured
            else "",
        ),
        "curves": ("On the way", _curves(found)),
        "cost": ("Quality and what it costs", _costs(found, metric)),
        "failed": (
            "Runs without a value",
            failed_table(found).html() if found.failed else "",
        ),
        "settings": ("What each cell sets", settings_table(found).html()),
        "commands": (
            "Each run alone",
            "<pre>" + escape("\n".join(commands(found))) + "</pre>",
        ),
    }
    head = (
        f"<p class='note'>{len(found.cells)} cells, {len(file.seeds)} seeds, {len(found.runs)} "
        f"runs; {escape(metric)}, {file.metric.better} is better; code "
        f"{', '.join(found.codes)}.</p>"
    )
    text = whole_page("ablate", file.question, head, sections, __version__)
    style = (files("qlora_pl.ablation.report") / "page.css").read_text("utf-8")
    return text.replace("</style>", f"{style}</style>", 1)


def _map(found: GridNumbers) -> str:
    if len(found.grid.axes) != 2:
        return ""
    (down, rows), (across, columns) = found.grid.axes.items()
    values: dict[tuple[str, str], float | None] = {
        (one.levels[down], one.levels[across]): one.mean for one in found.cells
    }
    names = [level.label for level in rows], [level.label for level in columns]
    label = f"{found.grid.file.metric.name}: {down} down, {across} across"
    picture = heat_map(*names, values, lambda value: f"{value:.3f}", label)
    return f"<p class='note'>{escape(label)}; darker is larger.</p>{picture}"


def _curves(found: GridNumbers) -> str:
    name = found.grid.file.metric.name
    note = "<p class='note'>Mean over seeds; the band reaches from the least to the largest.</p>"
    drawn = [curves(found.runs, key, key) for key in dict.fromkeys((name, "train/loss"))]
    return note + "".join(drawn) if any(drawn) else ""


def _costs(found: GridNumbers, metric: str) -> str:
    def chart(costs: dict[str, float], label: str) -> str:
        return cost(found.cells, costs, metric, label, found.grid.file.metric.better)

    memory = {one.name: one.memory_gib for one in found.cells if one.memory_gib is not None}
    minutes = {one.name: one.minutes for one in found.cells if one.minutes is not None}
    drawn = chart(memory, "peak memory of a run (GiB)") + chart(minutes, "minutes of training")
    note = "<p class='note'>Cells on the dashed line: none is both better and cheaper.</p>"
    return note + drawn if drawn else ""
