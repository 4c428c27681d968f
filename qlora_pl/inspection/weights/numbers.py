"""Every number of a quantisation report, in plain types: what report.json holds and pages show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_pl.inspection.weights.formats import Format, normal_error
from qlora_pl.inspection.weights.keeping import KEPT_BITS, Kept, KeptScore, Measure
from qlora_pl.inspection.weights.measuring import (
    MatrixNumbers,
    relative_output_rms,
    relative_rms,
)
from qlora_pl.merging.scoring import Score


@dataclass(frozen=True, kw_only=True)
class LogitNumbers:
    """What the base says with a part of it quantised."""

    whole: float
    """Perplexity of the unquantised base."""
    tokens: int
    """That were scored."""
    rows: int
    by_format: dict[str, Score]
    """All matrices, by the format's name."""
    by_layer: dict[str, Score] = field(default_factory=dict)
    """One layer, in the first format."""
    by_kind: dict[str, Score] = field(default_factory=dict)
    kept: list[KeptScore] = field(default_factory=list)
    """All but the first so many suggestions."""


@dataclass(frozen=True, kw_only=True)
class ModelNumbers:
    """All that is told of a base."""

    model: str
    version: str
    versions: dict[str, str]
    date: str
    device: str
    seconds: float
    precision: str
    """What the unquantised base computed in; empty: it was not asked."""
    data: str
    """Where rows came from; empty: there were none."""
    tokens_read: int
    formats: list[Format]
    matrices: list[MatrixNumbers]
    kept_weights: int
    """Of matrices that no run quantises: embeddings, head, what is skipped."""
    unfit: dict[str, str]
    """Formats some of whose blocks span rows, and the first such matrix."""
    logits: LogitNumbers | None
    measure: Measure
    """What suggestions are ranked by."""
    kept: list[Kept]
    """Suggestions, the best first."""
    yaml: str
    """The same as lines of a run's file; empty: there are none."""

    @property
    def main(self) -> Format:
        """The format that layers, kinds and suggestions are shown in: the first."""
        return self.formats[0]

    @property
    def layers(self) -> list[str]:
        """In their order; matrices outside of layers are of the layer without a name."""
        return list(dict.fromkeys(m.place.layer for m in self.matrices))

    @property
    def kinds(self) -> list[str]:
        """In the order of a layer."""
        return list(dict.fromkeys(m.place.kind for m in self.matrices))

    def where(self, layer: str | None = None, kind: str | None = None) -> list[MatrixNumbers]:
        """Matrices of a layer, of a kind, or of both."""
        return [
            m
            for m in self.matrices
            if layer in (None, m.place.layer) and kind in (None, m.place.kind)
        ]

    def packed_bytes(self, format: Format) -> float:
        """Of all matrices; one whose rows its blocks do not divide stays in 16 bits."""
        return sum(
            m.num_weights * (format.bits(m.shape[1]) if format.name in m.errors else KEPT_BITS) / 8
            for m in self.matrices
        )

    def bits(self, format: Format) -> float:
        """Of a weight, on average."""
        return 8 * self.packed_bytes(format) / sum(m.num_weights for m in self.matrices)

    def expected_rms(self, format: Format) -> float:
        """Relative, if every block's weights were normal; of the matrices that it fits."""
        fit = [m for m in self.matrices if format.name in m.errors]
        total = sum(m.squared_sum for m in fit)
        squares = (m.squared_sum * normal_error(format, m.shape[1]) ** 2 for m in fit)
        return float((sum(squares) / total) ** 0.5) if total else 0.0

    def largest(self, format: Format) -> float:
        """Error of a weight, in its matrix's root mean square."""
        return max(
            (
                m.errors[format.name].largest_error / (m.squared_sum / m.num_weights) ** 0.5
                for m in self.matrices
                if format.name in m.errors and m.squared_sum
            ),
            default=0.0,
        )

    def to_plain(self) -> dict[str, Any]:
        """For JSON: all that was measured, and the sums that tables show."""
        found = asdict(self)
        found["formats"] = {
            f.name: {
                **f.settings(),
                "is_trainable": f.is_trainable,
                "bits": self.bits(f),
                "packed_bytes": self.packed_bytes(f),
                "relative_rms": relative_rms(self.matrices, f),
                "relative_rms_if_normal": self.expected_rms(f),
                "largest_error": self.largest(f),
                "relative_output_rms": relative_output_rms(self.matrices, f),
            }
            for f in self.formats
        }
        found["matrices"] = [
            {**asdict(m), "place": m.place._asdict(), "relative_rms": _by_format(m, self.formats)}
            for m in self.matrices
        ]
        return found


def _by_format(matrix: MatrixNumbers, formats: Sequence[Format]) -> dict[str, float | None]:
    return {f.name: relative_rms([matrix], f) for f in formats if f.name in matrix.errors}


def non_normal_share(matrices: Sequence[MatrixNumbers]) -> float | None:
    """Of the neurons that were tested; each stands for its matrix's others."""
    tested = [m for m in matrices if m.normality.neurons]
    rows = sum(m.shape[0] for m in tested)
    failed = sum(m.shape[0] * m.normality.non_normal / m.normality.neurons for m in tested)
    return failed / rows if rows else None


def beside_outliers_share(matrices: Sequence[MatrixNumbers]) -> float:
    """Of weights, those whose block of 64 holds an outlier."""
    return _share(matrices, lambda m: m.normality.weights_beside_outliers)


def outlier_share(matrices: Sequence[MatrixNumbers]) -> float:
    """Of weights, those that are outliers."""
    return _share(matrices, lambda m: m.normality.outliers)


def mean_kurtosis(matrices: Sequence[MatrixNumbers]) -> float:
    """Over rows, above a normal distribution's."""
    rows = sum(m.shape[0] for m in matrices)
    return sum(m.shape[0] * m.normality.kurtosis for m in matrices) / rows if rows else 0.0


def _share(matrices: Sequence[MatrixNumbers], count: Callable[[MatrixNumbers], int]) -> float:
    return sum(map(count, matrices)) / max(sum(m.num_weights for m in matrices), 1)
