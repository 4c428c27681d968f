"""One pass over a base's matrices: what each way to keep them changes, and how normal they are.

A matrix is read, kept in every way, compared and forgotten. With rows to read, the inputs of some
modules at a time are caught, and the error of their outputs is measured beside that of weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_pl.inspection.places import ModulePlace, place_modules
from qlora_pl.inspection.weights.formats import ROWS, Format, decoded
from qlora_pl.inspection.weights.normality import Normality, normality
from qlora_pl.inspection.weights.opening import OpenBase
from qlora_pl.merging.scored_rows import ScoredRow
from qlora_pl.merging.scoring import logits_of

INPUT_BYTES = 2**28
"""Of inputs that are caught at a time; the model reads the rows again for the next modules."""


@dataclass(frozen=True, kw_only=True)
class FormatError:
    """What keeping one matrix in one way changes."""

    squared_error: float
    """Summed over the weights."""
    largest_error: float
    """Of a weight."""
    output_squared_error: float | None = None
    """Summed over outputs and tokens; None: no token came by."""


@dataclass(frozen=True, kw_only=True)
class MatrixNumbers:
    """All that is told of one matrix."""

    module: str
    place: ModulePlace
    shape: tuple[int, int]
    """``(out, in)``."""
    squared_sum: float
    """Of the weights."""
    output_squared_sum: float | None
    """Of its outputs, biases left out."""
    normality: Normality
    errors: dict[str, FormatError] = field(default_factory=dict)
    """By the format's name; those whose blocks do not fit are left out."""

    @property
    def num_weights(self) -> int:
        """Out times in."""
        return self.shape[0] * self.shape[1]


def relative_rms(matrices: Iterable[MatrixNumbers], format: Format) -> float | None:
    """The root of the squared error over the squared weights, of matrices together.

    None: the format fits none of them.
    """
    fit = [m for m in matrices if format.name in m.errors]
    total = sum(m.squared_sum for m in fit)
    return (
        math.sqrt(sum(m.errors[format.name].squared_error for m in fit) / total) if total else None
    )


def relative_output_rms(matrices: Iterable[MatrixNumbers], format: Format) -> float | None:
    """The same of outputs; the mean over matrices, whose outputs have scales of their own."""
    shares = [
        error.output_squared_error / m.output_squared_sum
        for m in matrices
        if (error := m.errors.get(format.name)) is not None
        and error.output_squared_error is not None
        and m.output_squared_sum
    ]
    return math.sqrt(sum(shares) / len(shares)) if shares else None


def measure(
    base: OpenBase, formats: Sequence[Format], rows: Sequence[ScoredRow] = ()
) -> Iterator[MatrixNumbers]:
    """Measure matrix after matrix.

    Args:
        base: Open; loaded to be asked if there are rows.
        formats: Ways to keep a matrix.
        rows: To be read for the errors of outputs; none: of weights alone.
    """
    places = place_modules(base.modules)
    with torch.no_grad():
        for some in _in_portions(base, rows):
            inputs = _inputs_of(base.model, some, rows) if rows else {}
            for module in some:
                yield _measure_one(base, module, places[module], formats, inputs.pop(module, []))


def _measure_one(
    base: OpenBase,
    module: str,
    place: ModulePlace,
    formats: Sequence[Format],
    inputs: list[Tensor],
) -> MatrixNumbers:
    matrix = base.matrix(module)
    wide = [x.to(base.device, torch.float32) for x in inputs]
    fitting = [f for f in formats if f.block_size is None or matrix.shape[1] % f.block_size == 0]
    errors = {}
    for format, kept in decoded(matrix, fitting):
        errors[format.name] = _error_of(kept.sub_(matrix), wide)
        del kept  # before the next is made: a large matrix is 180 MB
    return MatrixNumbers(
        module=module,
        place=place,
        shape=(matrix.shape[0], matrix.shape[1]),
        squared_sum=_squared_sum(matrix),
        output_squared_sum=_output_squared_sum(wide, matrix),
        normality=normality(matrix),
        errors=errors,
    )


def _error_of(difference: Tensor, inputs: list[Tensor]) -> FormatError:
    least, most = difference.aminmax()
    return FormatError(
        squared_error=_squared_sum(difference),
        largest_error=max(-float(least), float(most)),
        output_squared_error=_output_squared_sum(inputs, difference),
    )


def _squared_sum(matrix: Tensor) -> float:
    # Rows in float32, which is exact enough over some thousands, and then in float64.
    return sum(float(rows.square().sum(dim=1).double().sum()) for rows in matrix.split(ROWS))


def _output_squared_sum(inputs: list[Tensor], matrix: Tensor) -> float | None:
    if not inputs:
        return None
    return sum(_squared_sum(x @ matrix.t()) for x in inputs)


# -- inputs ----------------------------------------------------------------------------------------


def _in_portions(base: OpenBase, rows: Sequence[ScoredRow]) -> Iterator[list[str]]:
    """Modules whose inputs are held together."""
    tokens = sum(row.num_tokens for row in rows)
    portion: list[str] = []
    size = 0
    for module in base.modules:
        needed = tokens * base.inputs(module) * 4
        if portion and size + needed > INPUT_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(module)
        size += needed
    if portion:
        yield portion


def _inputs_of(
    model: Any, modules: Sequence[str], rows: Sequence[ScoredRow]
) -> dict[str, list[Tensor]]:
    """``(tokens, in)`` of each row that each module reads; experts may read none."""
    caught: dict[str, list[Tensor]] = {module: [] for module in modules}
    with _catching(model, caught):
        for row in rows:
            logits_of(model, row)
    return caught


@contextmanager
def _catching(model: Any, caught: dict[str, list[Tensor]]) -> Iterator[None]:
    def catch(name: str) -> Any:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].detach().flatten(0, -2)
            if len(x):
                caught[name].append(x)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(catch(name)) for name in caught]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
