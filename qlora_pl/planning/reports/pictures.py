"""Plans as stacked bars and curves, drawn by matplotlib, which only this file needs.

One plan with the memory of its card; several side by side, as the paper's figure 6 has them; and
how a plan grows with length, rank, batch and devices.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError

ENDINGS = (".png", ".svg", ".pdf")
COLOURS = (
    "#3b6ea5",
    "#7aa6d1",
    "#b9cfe6",
    "#d9d9d9",
    "#e08a3c",
    "#f0b67f",
    "#c65b4e",
    "#6aa56a",
    "#8d76b8",
    "#c4b5dc",
    "#d8b365",
    "#5f5f5f",
    "#9c9c9c",
)
"""One for each component in the order of a plan; neighbours that belong together are alike."""
FEW = ("#3b6ea5", "#9dbfdf", "#e08a3c", "#6aa56a", "#8d76b8", "#b5b5b5")
"""Where components are drawn in a few groups."""
GB = 1e9
DPI = 110
MARK_HEIGHT = 0.014
"""Half of a mark's, as a share of the highest bar."""
LEGEND_COLUMNS = 4
"""Of the names below a panel of bars, where no bar and no line can be beneath them."""
LINE = "#b03030"
PLATE: dict[str, Any] = {"bbox": {"boxstyle": "square,pad=0.12", "fc": "white", "ec": "none"}}
"""A number stays readable where a line crosses it."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A plan as a bar."""

    label: str
    components: Mapping[str, int]
    """Bytes, from the bottom up."""

    @property
    def total(self) -> int:
        """Its height in bytes."""
        return sum(self.components.values())


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Bars beside each other, in groups, on one scale."""

    title: str
    groups: Mapping[str, Sequence[Bar]]
    """By the name that stands below the group."""
    lines: Mapping[str, float]
    """Sizes of memory in bytes, by their names."""
    marks: Mapping[str, float] = field(default_factory=dict)
    """Published totals in bytes, by the group that they are drawn beside."""
    shows_components: bool = True
    """Whether a bar is cut into its components; False: one colour for each bar of a group."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How plans grow with one setting."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    """Bytes."""


def refuse_picture(file: Path, flag: str) -> None:
    """Find out before anything is computed that a picture cannot be written.

    Raises:
        ConfigurationError: for an ending that matplotlib has no format for, a folder that does not
            exist, or where matplotlib is not installed.
    """
    if file.suffix.lower() not in ENDINGS:
        raise ConfigurationError(
            f"{flag}: '{file}' must end in one of {', '.join(ENDINGS)}, which say what is drawn."
        )
    if file.is_dir():
        raise ConfigurationError(f"{flag}: '{file}' is a folder; name a file in it.")
    if not file.parent.is_dir():
        raise ConfigurationError(f"{flag}: no folder '{file.parent}'; make it first.")
    _pyplot(flag)


def _pyplot(flag: str = "--plot") -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigurationError(
            f"{flag}: pictures are drawn by matplotlib, which is not installed; "
            'pip install --constraint constraints.txt --editable ".[plot]".'
        ) from error
    matplotlib.use("Agg")  # no window, on no machine
    from matplotlib import pyplot

    return pyplot


def draw_panels(file: Path, panels: Sequence[Panel], title: str, flag: str = "--plot") -> None:
    """Draw bars with their components, one panel beside another.

    Args:
        file: Where to; its ending says in which format.
        panels: From left to right.
        title: Above all of them.
        flag: By which the picture was asked for, for errors.
    """
    pyplot = _pyplot(flag)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2.0 + 5.8 * len(panels), 5.4), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(n for p in panels for b in _bars(p) for n in b.components))
    palette = FEW if len(names) <= len(FEW) else COLOURS
    colours = {name: palette[place % len(palette)] for place, name in enumerate(names)}
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw_panel(axis, panel, colours)
    figure.suptitle(title, fontsize=12)
    _save(pyplot, figure, file)


def _bars(panel: Panel) -> list[Bar]:
    return [bar for bars in panel.groups.values() for bar in bars]


def _draw_panel(axis: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    most: float = max(bar.total for bar in _bars(panel)) / GB
    widest = max(len(bars) for bars in panel.groups.values())
    width = 0.8 / widest
    labels: dict[str, Any] = {}
    names = list(panel.groups)
    for place, bars in enumerate(panel.groups.values()):
        for number, bar in enumerate(bars):
            x = place + (number - (len(bars) - 1) / 2) * width
            bottom = 0.0
            parts = bar.components if panel.shows_components else {bar.label: bar.total}
            for name, size in parts.items():
                colour = colours.get(name, COLOURS[(0, 4, 9)[number % 3]])
                drawn = axis.bar(
                    x, size / GB, width * 0.92, bottom, color=colour, edgecolor="white", lw=0.4
                )
                labels.setdefault(name, drawn)
                bottom += size / GB
            shown = f"{bar.total / GB:,.1f}" if bar.total < 100 * GB else f"{bar.total / GB:,.0f}"
            top = max(bottom, panel.marks.get(names[place], 0) / GB + most * MARK_HEIGHT)
            axis.text(x, top + most * 0.012, shown, ha="center", va="bottom", fontsize=8.5, **PLATE)
    for place, name in enumerate(names):
        if name in panel.marks:
            (mark,) = axis.plot(
                place, panel.marks[name] / GB, "D", ms=6, color="#202020", mfc="white", zorder=4
            )
            labels["the paper's figure 6"] = mark
    for name, memory in panel.lines.items():
        if memory / GB <= most * 1.25:
            axis.axhline(memory / GB, color=LINE, lw=1, ls="--", zorder=0)
            axis.annotate(
                name,
                (1.0, memory / GB),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=LINE,
                annotation_clip=False,
            )
    axis.set_xticks(range(len(panel.groups)), list(panel.groups))
    axis.set_ylim(0, max(most, *(s / GB for s in _shown(panel.lines, most))) * 1.1)
    axis.set_ylabel("GB")
    axis.set_title(panel.title, fontsize=10.5)
    axis.spines[["top", "right"]].set_visible(False)
    handles = list(labels.items())
    axis.legend(
        [handle for _, handle in handles],
        [name for name, _ in handles],
        fontsize=8,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.07),
        ncols=LEGEND_COLUMNS,
    )


def _shown(lines: Mapping[str, float], most: float) -> list[float]:
    return [size for size in lines.values() if size / GB <= most * 1.25] or [0.0]


def draw_plan(file: Path, title: str, bar: Bar, lines: Mapping[str, float]) -> None:
    """Draw one plan as a lying bar, each component with its bytes in the legend.

    Args:
        file: Where to.
        title: What is planned.
        bar: The plan.
        lines: Sizes of memory in bytes, by their names.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(9.5, 3.6), layout="constrained")
    left = 0.0
    for place, (name, size) in enumerate(bar.components.items()):
        if not size:
            continue
        axis.barh(
            0,
            size / GB,
            0.6,
            left,
            color=COLOURS[place % len(COLOURS)],
            edgecolor="white",
            lw=0.5,
            label=f"{name}: {_size(size)}",
        )
        left += size / GB
    total = f"{bar.total / GB:,.1f} GB"
    axis.text(left, 0.34, total, ha="right", va="bottom", fontsize=9.5, zorder=4, **PLATE)
    for name, memory in lines.items():
        axis.axvline(memory / GB, color=LINE, lw=1.2, ls="--")
        axis.text(memory / GB, -0.34, f" {name} ", ha="right", va="top", fontsize=9, color=LINE)
    ends = [bar.total, *lines.values()]
    axis.set_xlim(0, max(ends) / GB * 1.04)
    axis.set_ylim(-0.55, 0.55)
    axis.set_yticks([])
    axis.set_xlabel("GB")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(
        fontsize=8.5, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22)
    )
    axis.set_title(textwrap.fill(title, 100), fontsize=10)
    _save(pyplot, figure, file)


def draw_curves(file: Path, title: str, panels: Mapping[str, Sequence[Curve]]) -> None:
    """Draw how plans grow: a panel for each setting, a curve for each kind of run.

    Args:
        file: Where to.
        title: Above all panels.
        panels: Curves, by the name of what stands below them.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.7), squeeze=False, layout="constrained"
    )
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for place, curve in enumerate(curves):
            axis.plot(
                curve.x,
                [size / GB for size in curve.y],
                marker="o",
                ms=3.5,
                lw=1.4,
                color=COLOURS[(0, 4, 7, 9)[place % 4]],
                label=curve.label,
            )
        axis.set_xscale("log", base=2)
        ticks = sorted({x for curve in curves for x in curve.x})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.set_xticks([], minor=True)
        axis.set_xlabel(name)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    axes[0][0].set_ylabel("GB on each device")
    figure.suptitle(title, fontsize=11.5)
    _save(pyplot, figure, file)


def _size(size: float) -> str:
    return f"{size / GB:,.2f} GB" if size >= 0.1 * GB else f"{size / 1e6:,.0f} MB"


def _save(pyplot: Any, figure: Any, file: Path) -> None:
    try:
        figure.savefig(file, dpi=DPI, metadata={"Software": None} if _is_png(file) else None)
    except OSError as error:
        raise ConfigurationError(
            f"'{file}' cannot be written ({error.strerror}); name another file."
        ) from error
    finally:
        pyplot.close(figure)


def _is_png(file: Path) -> bool:
    return file.suffix.lower() == ".png"
