"""Which few modules are worth their 16 bits: ranked by the error that a byte removes.

The error is, of what was measured, the nearest to what counts: KL of the logits, else of outputs,
else of weights. KL was measured for whole layers and whole kinds, and a module's part of it is
estimated from both; what keeping the chosen ones really removes is then measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_pl.inspection.weights.formats import Format
from qlora_pl.inspection.weights.measuring import MatrixNumbers
from qlora_pl.merging.scoring import Score

Measure = Literal["kl", "outputs", "weights"]
KEPT_BITS = 16


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One module that stays in 16 bits, after those before it."""

    module: str
    added_bytes: float
    """By which the base grows."""
    share: float
    """Of the whole error that its own is estimated to be."""


@dataclass(frozen=True, kw_only=True)
class KeptScore:
    """A base whose first so many suggestions stay in 16 bits."""

    number: int
    score: Score


def rank(
    matrices: Sequence[MatrixNumbers],
    format: Format,
    by_layer: Mapping[str, Score],
    by_kind: Mapping[str, Score],
) -> tuple[Measure, list[Kept]]:
    """All modules, the one that removes most error for a byte first.

    Args:
        matrices: Measured.
        format: How all others are kept.
        by_layer: The base with one layer quantised; empty: logits were not asked.
        by_kind: With one kind.

    Returns:
        What the error is of, and the modules.
    """
    quantised = [m for m in matrices if format.name in m.errors]
    measure: Measure
    if by_layer and by_kind:
        measure, errors = "kl", _divergence(quantised, by_layer, by_kind)
    elif any(m.output_squared_sum for m in quantised):
        measure, errors = "outputs", [_output_share(m, format) for m in quantised]
    else:
        measure, errors = "weights", [m.errors[format.name].squared_error for m in quantised]
    total = sum(errors) or 1.0
    found = [
        Kept(module=m.module, added_bytes=added_bytes(m, format), share=error / total)
        for m, error in zip(quantised, errors, strict=True)
    ]
    return measure, sorted(found, key=lambda kept: -kept.share / kept.added_bytes)


def added_bytes(matrix: MatrixNumbers, format: Format) -> float:
    """What keeping a matrix in 16 bits costs."""
    return matrix.num_weights * (KEPT_BITS - format.bits(matrix.shape[1])) / 8


def _divergence(
    matrices: Sequence[MatrixNumbers], by_layer: Mapping[str, Score], by_kind: Mapping[str, Score]
) -> list[float]:
    """As if what a layer and what a kind add were independent: the product of the two."""
    sharing = Counter(m.place for m in matrices)  # experts of one layer
    return [
        _kl(by_layer, m.place.layer) * _kl(by_kind, m.place.kind) / sharing[m.place]
        for m in matrices
    ]


def _kl(scores: Mapping[str, Score], name: str) -> float:
    return max(scores[name].kl_divergence, 0.0) if name in scores else 0.0


def _output_share(matrix: MatrixNumbers, format: Format) -> float:
    error = matrix.errors[format.name].output_squared_error
    return (error or 0.0) / (matrix.output_squared_sum or 1.0)


def yaml_lines(
    format: Format,
    kept: Sequence[Kept],
    matrices: Sequence[MatrixNumbers],
    skipped: Sequence[str] = (),
) -> str:
    """The suggestion as lines of a run's file, which starts with them as they are.

    Args:
        format: How all others are kept.
        kept: What is suggested.
        matrices: All of them; a run refuses those that the format does not fit until it skips them.
        skipped: What was not to be quantised anyway; the list replaces such a one.
    """
    settings: dict[str, Any] = format.settings()
    lines = ["model:", "  quantization:"]
    lines += [f"    {key}: {_as_yaml(value)}" for key, value in settings.items()]
    lines.append("    skip_modules:")
    names = [*skipped, *_unfit(format, matrices), *(k.module for k in kept)]
    lines += [f"      - {name}" for name in names]
    return "\n".join(lines)


def _unfit(format: Format, matrices: Sequence[MatrixNumbers]) -> list[str]:
    """Modules whose rows hold no whole blocks, by the last part where all of that name are such."""
    fits: dict[str, set[bool]] = {}
    for m in matrices:
        fits.setdefault(_last(m.module), set()).add(format.name in m.errors)
    names = (
        _last(m.module) if fits[_last(m.module)] == {False} else m.module
        for m in matrices
        if format.name not in m.errors
    )
    return list(dict.fromkeys(names))


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
