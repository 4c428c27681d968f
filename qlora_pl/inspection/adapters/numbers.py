"""Every number about an adapter, in plain types, and what in them is worth a second look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from qlora_pl.inspection.adapters.beside_base import BaseBeside, Change
from qlora_pl.inspection.adapters.matrices import Adapter, Pair
from qlora_pl.inspection.adapters.spectra import Spectrum, inner_product, spectrum
from qlora_pl.inspection.places import ModulePlace

DEAD = 1e-3
"""Of the median norm of its kind: below it a change is as good as none."""
EXPLODING = 10.0
"""Times the median norm of its kind."""
ENOUGH = 3
"""Modules of a kind that have a median."""
NAMED = 3
"""Modules that a sentence about many of them names."""


@dataclass(frozen=True, kw_only=True)
class PairNumbers:
    """All that is told of one module's change."""

    module: str
    place: ModulePlace
    shape: tuple[int, int]
    """``(out, in)``."""
    rank: int
    scale: float
    num_wrong: int
    """Values that are NaN or infinite; there are no other numbers then."""
    norm_a: float | None
    norm_b: float | None
    spectrum: Spectrum | None
    change: Change | None
    """Beside the base; None: it is not at hand."""
    has_magnitude: bool


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Two adapters beside each other."""

    other: str
    cosines: dict[str, float | None]
    """Of scale x B A, by module; None: one of the two is zero or no number."""
    whole: float | None
    """Of all common modules as one vector."""
    only_here: list[str]
    only_there: list[str]
    has_magnitudes: bool
    """Whether one is a DoRA, of which B A is a part only."""


@dataclass(frozen=True, kw_only=True)
class AdapterNumbers:
    """All that is told of an adapter."""

    adapter: str
    version: str
    base: str | None
    config: dict[str, Any]
    """``r``, ``lora_alpha`` and whatever else decides on scales."""
    step: int | None
    """Optimizer steps it was trained for; None: no file says."""
    pairs: list[PairNumbers]
    biases: dict[str, float]
    """Norm of each trained bias, or of its change where the base is at hand."""
    are_biases_changes: bool
    others: dict[str, float]
    """Norms of whole layers and rows that were trained."""
    likeness: Likeness | None
    notes: list[str]
    findings: list[str] = field(default_factory=list)
    """A sentence each."""
    damage: list[str] = field(default_factory=list)
    """Those for which the adapter cannot be used."""

    @property
    def layers(self) -> list[str]:
        """In their order."""
        return list(dict.fromkeys(p.place.layer for p in self.pairs))

    @property
    def kinds(self) -> list[str]:
        """In the order of a layer."""
        return list(dict.fromkeys(p.place.kind for p in self.pairs))

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        found["pairs"] = [
            {
                **asdict(p),
                "place": p.place._asdict(),
                "share": None if p.change is None else p.change.share,
            }
            for p in self.pairs
        ]
        return found


def pair_numbers(pair: Pair, beside: BaseBeside | None) -> PairNumbers:
    """Measure one module's change."""
    wrong = pair.num_wrong
    found = None if wrong else spectrum(pair)
    return PairNumbers(
        module=pair.module,
        place=pair.place,
        shape=pair.shape,
        rank=pair.rank,
        scale=pair.scale,
        num_wrong=wrong,
        norm_a=None if wrong else float(pair.a.double().norm()),
        norm_b=None if wrong else float(pair.b.double().norm()),
        spectrum=found,
        change=None if beside is None or found is None else beside.change(pair, found.norm),
        has_magnitude=pair.magnitude is not None,
    )


def likeness(one: Adapter, other: Adapter) -> tuple[Likeness, list[str]]:
    """How alike two adapters' changes are, and what stands in the way of comparing them."""
    cosines: dict[str, float | None] = {}
    shared = [name for name in one.pairs if name in other.pairs]
    notes = []
    totals = [0.0, 0.0, 0.0]
    for name in shared:
        first, second = one.pairs[name], other.pairs[name]
        if first.shape != second.shape:
            notes.append(
                f"'{name}' is {first.shape} in one and {second.shape} in the other; it is left out."
            )
            continue
        if first.num_wrong or second.num_wrong:
            cosines[name] = None
            continue
        product = inner_product(first, second)
        squares = inner_product(first, first), inner_product(second, second)
        cosines[name] = _cosine(product, *squares)
        totals = [t + x for t, x in zip(totals, (product, *squares), strict=True)]
    if (word := _other_bases(one, other)) is not None:
        notes.append(word)
    found = Likeness(
        other=other.name,
        cosines=cosines,
        whole=_cosine(totals[0], totals[1], totals[2]),
        only_here=[name for name in one.pairs if name not in other.pairs],
        only_there=[name for name in other.pairs if name not in one.pairs],
        has_magnitudes=any(p.magnitude is not None for a in (one, other) for p in a.pairs.values()),
    )
    return found, notes


def _other_bases(one: Adapter, other: Adapter) -> str | None:
    """A sentence if they are not known to be of the same weights; None: they are."""
    if one.weights is not None and other.weights is not None:
        if one.weights == other.weights:
            return None
        return (
            "They were trained over other weights (their bases' fingerprints are "
            f"{one.weights[:12]} and {other.weights[:12]}), so a cosine says nothing."
        )
    if one.base == other.base:
        return None
    return (
        f"They are of bases of other names ('{one.base}' and '{other.base}'); over other "
        "weights a cosine says nothing."
    )


def _cosine(product: float, first: float, second: float) -> float | None:
    if first <= 0 or second <= 0:
        return None
    return max(-1.0, min(1.0, product / (first * second) ** 0.5))


# -- findings --------------------------------------------------------------------------------------


def damage(pairs: Sequence[PairNumbers]) -> list[str]:
    """Values that are no numbers."""
    return [
        f"'{p.module}' holds {p.num_wrong:,} values that are NaN or infinite."
        for p in pairs
        if p.num_wrong
    ]


def findings(pairs: Sequence[PairNumbers]) -> list[str]:
    """Dead and exploding matrices, a sentence each."""
    sound = [p for p in pairs if p.spectrum is not None]
    zero = [p for p in sound if p.norm_b == 0 or p.norm_a == 0]
    told = []
    # Of a DoRA the lengths of rows may have been trained all the same.
    but = ", but for its rows' lengths" if any(p.has_magnitude for p in zero) else ""
    if zero and len(zero) == len(sound):
        return [
            f"Every B (or A) is exactly zero: this adapter changes nothing{but}, as before its "
            "first step."
        ]
    if zero:
        told.append(
            f"B (or A) is exactly zero in {len(zero)} of {len(pairs)} modules, which change "
            f"nothing{but}: {_some(zero)}."
        )
    for kind in dict.fromkeys(p.place.kind for p in sound):
        alive = [p for p in sound if p.place.kind == kind and p not in zero]
        if len(alive) < ENOUGH:
            continue
        middle = median(_norm(p) for p in alive)
        for p in alive:
            ratio = _norm(p) / middle
            if ratio < DEAD:
                told.append(f"'{p.module}' is as good as dead: {ratio:.1e} of its kind's median.")
            if ratio > EXPLODING:
                told.append(f"'{p.module}' is {ratio:,.0f} times its kind's median norm.")
    return told + _changed_by_more_than_themselves(sound)


def _changed_by_more_than_themselves(pairs: Sequence[PairNumbers]) -> list[str]:
    shares = {p.module: p.change.share for p in pairs if p.change is not None}
    above = sorted((name for name in shares if shares[name] > 1), key=lambda name: -shares[name])
    if not above:
        return []
    named = ", ".join(f"{name} ({100 * shares[name]:.0f} % of its norm)" for name in above[:NAMED])
    more = f" and {len(above) - NAMED:,} more" if len(above) > NAMED else ""
    return [f"Changed by more than the weight itself: {named}{more}."]


def _norm(pair: PairNumbers) -> float:
    assert pair.spectrum is not None
    return pair.spectrum.norm


def _some(pairs: Sequence[PairNumbers]) -> str:
    named = ", ".join(p.module for p in pairs[:NAMED])
    return named + (f" and {len(pairs) - NAMED:,} more" if len(pairs) > NAMED else "")
