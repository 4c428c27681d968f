"""Tables for a terminal and a page: one set of cells, two ways to print it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qlora_pl.inspection.cells import table


@dataclass(frozen=True)
class Cells:
    """A table of plain text; columns whose name begins with # are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def without_empty(self) -> Cells:
        """The same without columns that say nothing."""
        kept = [i for i in range(len(self.head)) if any(row[i] for row in self.rows)]
        return Cells([self.head[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    def markdown(self) -> str:
        """Aligned, so that it is a table without being rendered."""
        names = [name.lstrip("#") for name in self.head]
        is_number = [name.startswith("#") for name in self.head]
        lines = [names, *self.rows]
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(names))]

        def line(cells: Sequence[str]) -> str:
            shown = (
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, number in zip(cells, widths, is_number, strict=True)
            )
            return f"| {' | '.join(shown)} |"

        rule = (
            f"{'-' * (width - 1)}:" if number else "-" * width
            for width, number in zip(widths, is_number, strict=True)
        )
        return "\n".join([line(names), f"| {' | '.join(rule)} |", *map(line, self.rows)])

    def html(self, chosen: Sequence[bool] = ()) -> str:
        """The same on a page."""
        return table(self.head, [[escape(cell) for cell in row] for row in self.rows], chosen)
