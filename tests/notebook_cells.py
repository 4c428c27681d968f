"""Cells of a notebook, and what they printed."""

from __future__ import annotations

from typing import Any


def code_cells(notebook: Any) -> dict[str, Any]:
    """By identifier."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell: Any) -> str:
    """What a cell wrote to standard output."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def assert_clean(notebook: Any) -> None:
    """A notebook is kept without outputs and counts, so that its changes can be read."""
    for cell in code_cells(notebook).values():
        assert not cell.outputs, f"clear the outputs of '{cell.id}'"
        assert cell.execution_count is None, f"clear the execution count of '{cell.id}'"
        assert not set(cell.metadata) - {"tags"}, f"'{cell.id}' keeps {set(cell.metadata)}"
