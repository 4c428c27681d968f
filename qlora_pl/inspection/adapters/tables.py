"""The tables about an adapter, and its summary in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from qlora_pl.inspection.adapters.numbers import AdapterNumbers, Likeness, PairNumbers
from qlora_pl.inspection.markdown import Cells

FINDINGS_SHOWN = 12
BIASES_SHOWN = 12


def norm_of(pair: PairNumbers) -> float | None:
    """Of scale x B A."""
    return None if pair.spectrum is None else pair.spectrum.norm


def rank_of(pair: PairNumbers) -> float | None:
    """Effective rank."""
    return None if pair.spectrum is None else pair.spectrum.effective_rank


def stable_rank_of(pair: PairNumbers) -> float | None:
    """Squared norm over the squared largest singular value."""
    return None if pair.spectrum is None else pair.spectrum.stable_rank


def used_rank_of(pair: PairNumbers) -> float | None:
    """Singular values that count."""
    return None if pair.spectrum is None else pair.spectrum.used_rank


def share_of(pair: PairNumbers) -> float | None:
    """Of the weight that is changed."""
    return None if pair.change is None else pair.change.share


def mean_of(
    pairs: Sequence[PairNumbers], measure: Callable[[PairNumbers], float | None]
) -> float | None:
    """Over those that have the number."""
    found = [value for pair in pairs if (value := measure(pair)) is not None]
    return mean(found) if found else None


def share_words(share: float | None) -> str:
    """A share as text."""
    return "" if share is None else f"{share:.2%}".replace("%", " %")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def groups_table(numbers: AdapterNumbers, by: str) -> Cells:
    """A row for each kind of module, or for each layer: means over its modules.

    Args:
        numbers: Of the adapter.
        by: ``kind`` or ``layer``.
    """
    names = numbers.kinds if by == "kind" else numbers.layers
    rows = []
    for name in names:
        pairs = [p for p in numbers.pairs if getattr(p.place, by) == name]
        rows.append([name or "none", *_group(pairs, numbers.likeness)])
    return Cells((by, *_HEAD), rows).without_empty()


_HEAD = (
    "#modules",
    "#rank",
    "#scale",
    "#norm of BA",
    "#share of the weight",
    "#effective rank",
    "#stable rank",
    "#in use",
    "#cosine",
)


def _group(pairs: Sequence[PairNumbers], likeness: Likeness | None) -> list[str]:
    cosines = [
        cosine
        for p in pairs
        if likeness is not None and (cosine := likeness.cosines.get(p.module)) is not None
    ]
    return [
        str(len(pairs)),
        _range([p.rank for p in pairs]),
        _range([p.scale for p in pairs]),
        _number(mean_of(pairs, norm_of), ".4g"),
        share_words(mean_of(pairs, share_of)),
        _number(mean_of(pairs, rank_of), ".1f"),
        _number(mean_of(pairs, stable_rank_of), ".1f"),
        _number(mean_of(pairs, used_rank_of), ".1f"),
        _number(mean(cosines) if cosines else None, "+.3f"),
    ]


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def summary(numbers: AdapterNumbers) -> str:
    """What the command prints."""
    parts = [f"# {numbers.adapter}: what it changes", opening(numbers)]
    parts += [groups_table(numbers, "kind").markdown()]
    if told := found_words(numbers):
        parts.append("\n".join(f"- {sentence}" for sentence in told))
    else:
        parts.append("No matrix is dead, exploding or no number.")
    if numbers.likeness is not None:
        parts.append(likeness_words(numbers.likeness))
    if numbers.biases:
        parts.append(biases_words(numbers))
    if numbers.others:
        parts.append(others_words(numbers))
    parts += numbers.notes
    return "\n\n".join(parts)


def opening(numbers: AdapterNumbers) -> str:
    """What it is."""
    settings = ", ".join(f"{key} {value}" for key, value in numbers.config.items() if value)
    step = "" if numbers.step is None else f" after {numbers.step:,} steps"
    weights = sum(p.rank * sum(p.shape) for p in numbers.pairs)
    return (
        f"{len(numbers.pairs):,} modules, {weights:,} weights in A and B{step}; {settings}. "
        f"Base: {numbers.base or 'no file names it'}."
    )


def found_words(numbers: AdapterNumbers) -> list[str]:
    """Damage and findings, the first so many."""
    told = [*numbers.damage, *numbers.findings]
    more = len(told) - FINDINGS_SHOWN
    return told[:FINDINGS_SHOWN] + ([f"{more:,} more are in report.json."] if more > 0 else [])


def likeness_words(likeness: Likeness) -> str:
    """How alike two adapters are, in a sentence or two."""
    known = {name: c for name, c in likeness.cosines.items() if c is not None}
    if not known:
        return f"No module of '{likeness.other}' can be compared."
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    told = (
        f"Against '{likeness.other}': the cosine of all common modules together is "
        f"{_number(likeness.whole, '+.4f')}; of single modules from {known[low]:+.4f} ({low}) to "
        f"{known[high]:+.4f} ({high})."
    )
    for missing, where in ((likeness.only_here, "other"), (likeness.only_there, "first")):
        if missing:
            told += f" {len(missing):,} modules are not in the {where} one ({missing[0]})."
    if likeness.has_magnitudes:
        told += " One of them is a DoRA, of which B A alone was compared."
    return told


def biases_words(numbers: AdapterNumbers) -> str:
    """Trained biases, the largest first."""
    what = "changes of" if numbers.are_biases_changes else "norms of"
    largest = sorted(numbers.biases.items(), key=lambda item: -item[1])[:BIASES_SHOWN]
    named = ", ".join(f"{name} {value:.3g}" for name, value in largest)
    return f"Trained biases: {len(numbers.biases):,}; largest {what} them: {named}."


def others_words(numbers: AdapterNumbers) -> str:
    """Whole layers and rows."""
    named = ", ".join(f"{name} (norm {value:.3g})" for name, value in numbers.others.items())
    return f"Trained whole, beside A and B: {named}."
