"""What the runs of a grid would take of a card, by the planner, before any of them starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_pl.ablation.grid.resolving import GridRun
from qlora_pl.errors import ConfigurationError
from qlora_pl.inspection.markdown import Cells
from qlora_pl.planning.reports.report import result_on
from qlora_pl.planning.runs.run_file import planned_config
from qlora_pl.planning.work.cards import Card

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class CellCost:
    """One cell's run."""

    cell: str
    num_runs: int
    bytes: float | None
    """On each device; None: the base's sizes are not known."""
    verdict: str | None
    """Of a card: fits, fits with paging, does not fit; None: no card was named."""
    hours: float | None
    """Of one run, on each device; None: not known."""
    price: float | None = None
    """US dollars of one run."""
    num_devices: int = 1
    why_not: str | None = None
    """Why nothing is known."""

    @property
    def device_hours(self) -> float | None:
        """Of all its runs."""
        return None if self.hours is None else self.hours * self.num_runs * self.num_devices


def costs_of(runs: Sequence[GridRun], card: Card | None) -> list[CellCost]:
    """What each cell costs.

    Args:
        runs: Of ``resolve``.
        card: None: memory alone is planned.
    """
    cells: dict[str, list[GridRun]] = {}
    for run in runs:
        cells.setdefault(run.cell.name, []).append(run)
    return [_cost(name, own, card) for name, own in cells.items()]


def _cost(name: str, runs: Sequence[GridRun], card: Card | None) -> CellCost:
    try:
        planned = planned_config(runs[0].parsed)
    except ConfigurationError as error:
        return CellCost(
            cell=name,
            num_runs=len(runs),
            bytes=None,
            verdict=None,
            hours=None,
            why_not=error.problems[0],
        )
    num_devices = planned.setting.num_devices
    if card is None:
        total = planned.plan(None).total
        return CellCost(
            cell=name,
            num_runs=len(runs),
            bytes=total,
            verdict=None,
            hours=None,
            num_devices=num_devices,
        )
    result = result_on(planned, card)
    return CellCost(
        cell=name,
        num_runs=len(runs),
        bytes=result.plan.total,
        verdict=result.verdict.kind,
        hours=None if result.time is None else result.time.hours,
        price=None if result.time is None else result.time.price,
        num_devices=num_devices,
    )


def costs_text(costs: Sequence[CellCost], card: Card | None, seeds: int) -> str:
    """The same as a table with its sums.

    Args:
        costs: Of all cells.
        card: That it was planned for.
        seeds: Runs of each cell.
    """
    rows = [
        [
            one.cell,
            str(one.num_runs),
            "" if one.bytes is None else f"{one.bytes / GIB:.1f}",
            one.verdict or one.why_not or "",
            "" if one.hours is None else f"{one.hours:.2f}",
        ]
        for one in costs
    ]
    head = ["cell", "#runs", "#GiB a device", f"on {card.name}" if card else "", "#hours a run"]
    lines = [Cells(head, rows).without_empty().markdown(), ""]
    number = sum(one.num_runs for one in costs)
    lines.append(f"{number} runs in {len(costs)} cells, {seeds} seeds each.")
    hours = [one.device_hours for one in costs]
    if card is not None and None not in hours and hours:
        dollars = sum((one.price or 0.0) * one.num_runs for one in costs)
        lines.append(
            f"{sum(hour or 0.0 for hour in hours):.1f} device hours on {card.name} in all, "
            f"about {dollars:,.0f} US dollars."
        )
    misfits = [one.cell for one in costs if one.verdict == "does not fit"]
    if misfits and card is not None:
        told = ", ".join(misfits[:5]) + (" and more" if len(misfits) > 5 else "")
        lines.append(f"{len(misfits)} cells do not fit on {card.name}: {told}.")
    if card is None:
        lines.append("--gpu CARD says whether each fits, and how long it takes.")
    return "\n".join(lines)
