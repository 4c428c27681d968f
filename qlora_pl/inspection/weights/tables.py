"""The tables of a quantisation report, and its summary in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_pl.inspection.markdown import Cells
from qlora_pl.inspection.weights.measuring import (
    MatrixNumbers,
    relative_output_rms,
    relative_rms,
)
from qlora_pl.inspection.weights.numbers import (
    ModelNumbers,
    beside_outliers_share,
    mean_kurtosis,
    non_normal_share,
    outlier_share,
)
from qlora_pl.merging.scoring import Score

LAYERS_NAMED = 3
RANKED_BY = {
    "kl": "the KL of the logits (a module's part is estimated from its layer's and its kind's)",
    "outputs": "the relative squared error of outputs",
    "weights": "the squared error of weights (--data tells which of them matter)",
}
"""Of which each suggestion removes most for a byte."""


def percent(share: float | None, digits: int = 2) -> str:
    """A share as text; empty: there is none."""
    return "" if share is None else f"{share:.{digits}%}".replace("%", " %")


def megabytes(number: float) -> str:
    """Bytes as text, in MB of a million; few of them in kB."""
    if number < 1e5:
        return f"{number / 1e3:,.1f} kB"
    return f"{number / 1e6:,.1f} MB" if number < 1e8 else f"{number / 1e6:,.0f} MB"


def nats(score: Score | None) -> str:
    """A divergence as text."""
    return "" if score is None else f"{score.kl_divergence:.2g}"


def formats_table(numbers: ModelNumbers) -> Cells:
    """A row for each way to keep the matrices."""
    asked = numbers.logits.by_format if numbers.logits is not None else {}
    rows = []
    for format in numbers.formats:
        score = asked.get(format.name)
        rows.append(
            [
                format.name,
                f"{numbers.bits(format):.3f}",
                megabytes(numbers.packed_bytes(format)),
                percent(relative_rms(numbers.matrices, format), 3),
                percent(numbers.expected_rms(format), 3),
                f"{numbers.largest(format):.2f}",
                percent(relative_output_rms(numbers.matrices, format)),
                "" if score is None else f"{score.kl_divergence:.4f}",
                "" if score is None else f"{score.perplexity:.3f}",
                "" if score is None else percent(score.top1_agreement, 1),
            ]
        )
    head = (
        "kept as",
        "#bits a weight",
        "#size",
        "#error of weights",
        "#if normal",
        "#largest",
        "#of outputs",
        "#KL, nats",
        "#perplexity",
        "#same token",
    )
    return Cells(head, rows).without_empty()


def kinds_table(numbers: ModelNumbers) -> Cells:
    """A row for each kind of module, in the first format."""
    asked = numbers.logits.by_kind if numbers.logits is not None else {}
    rows = [
        [kind, *_group(numbers, numbers.where(kind=kind)), nats(asked.get(kind))]
        for kind in numbers.kinds
    ]
    return Cells(("kind", *_GROUP_HEAD, "#KL if only it, nats"), rows).without_empty()


def layers_table(numbers: ModelNumbers) -> Cells:
    """A row for each layer, in the first format."""
    asked = numbers.logits.by_layer if numbers.logits is not None else {}
    rows = [
        [layer or "none", *_group(numbers, numbers.where(layer=layer)), nats(asked.get(layer))]
        for layer in numbers.layers
    ]
    return Cells(("layer", *_GROUP_HEAD, "#KL if only it, nats"), rows).without_empty()


_GROUP_HEAD = (
    "#weights",
    "#error of weights",
    "#of outputs",
    "#not normal",
    "#kurtosis",
    "#outliers",
    "#beside one",
)


def _group(numbers: ModelNumbers, matrices: Sequence[MatrixNumbers]) -> list[str]:
    return [
        f"{sum(m.num_weights for m in matrices):,}",
        percent(relative_rms(matrices, numbers.main)),
        percent(relative_output_rms(matrices, numbers.main)),
        percent(non_normal_share(matrices), 1),
        f"{mean_kurtosis(matrices):+.2f}",
        percent(outlier_share(matrices), 4),
        percent(beside_outliers_share(matrices)),
    ]


def every_format_table(numbers: ModelNumbers, by: str) -> Cells:
    """Error of weights in every format: a row for each kind of module, or for each layer.

    Args:
        numbers: Of the base.
        by: ``kind`` or ``layer``.
    """
    names = numbers.kinds if by == "kind" else numbers.layers
    rows = []
    for name in names:
        some = [m for m in numbers.matrices if getattr(m.place, by) == name]
        errors = (percent(relative_rms(some, format)) for format in numbers.formats)
        rows.append([name or "none", *errors])
    return Cells((by, *(f"#{format.name}" for format in numbers.formats)), rows)


def kept_table(numbers: ModelNumbers) -> Cells:
    """The suggestions, one more in each row, and what was measured with so many."""
    measured = {}
    if numbers.logits is not None:
        measured = {found.number: found.score for found in numbers.logits.kept}
    rows, size, share = [], 0.0, 0.0
    for number, kept in enumerate(numbers.kept, start=1):
        size += kept.added_bytes
        share += kept.share
        score = measured.get(number)
        rows.append(
            [
                str(number),
                kept.module,
                f"+{megabytes(size)}",
                f"-{percent(share, 1)}",
                f"{score.kl_divergence:.4f}" if score else "",
                _signed(-_removed(numbers, score)) if score else "",
            ]
        )
    estimated = "#of KL, estimated" if numbers.measure == "kl" else "#of error"
    head = ("#k", "kept in 16 bits besides", "#size", estimated, "#KL, nats", "#of KL, measured")
    return Cells(head, rows).without_empty()


def _signed(change: float) -> str:
    # What is kept may make the rest worse, where errors had cancelled each other.
    return f"{change:+.1%}".replace("%", " %")


def _removed(numbers: ModelNumbers, score: Score) -> float:
    assert numbers.logits is not None
    before = numbers.logits.by_format[numbers.main.name].kl_divergence
    return 1 - score.kl_divergence / before if before else 0.0


def summary(numbers: ModelNumbers) -> str:
    """What the command prints: the tables that fit a terminal, and the suggestion."""
    parts = [f"# {numbers.model}: what quantising costs", opening(numbers)]
    parts.append(formats_table(numbers).markdown())
    parts += [*left_out(numbers), normal_or_not(numbers)]
    parts += [f"By kind of module, as {numbers.main.name}:", kinds_table(numbers).markdown()]
    if worst := worst_layers(numbers):
        parts.append(worst)
    if numbers.kept:
        parts += [
            f"Kept in 16 bits beside {numbers.main.name}, first what removes most for a byte of "
            f"{RANKED_BY[numbers.measure]}:",
            kept_table(numbers).markdown(),
        ]
        parts.append(f"```yaml\n{numbers.yaml}\n```" if numbers.yaml else no_yaml(numbers))
    return "\n\n".join(part for part in parts if part)


def opening(numbers: ModelNumbers) -> str:
    """What was measured, and with what."""
    weights = sum(m.num_weights for m in numbers.matrices)
    versions = ", ".join(f"{name} {version}" for name, version in numbers.versions.items())
    told = (
        f"{len(numbers.matrices):,} matrices of {weights:,} weights; {numbers.kept_weights:,} more "
        f"(embeddings, head) are never quantised. {numbers.date}, {versions}, {numbers.device}, "
        f"{numbers.seconds:.0f} s."
    )
    if numbers.logits is not None:
        told += (
            f" {numbers.logits.tokens:,} tokens of {numbers.logits.rows:,} rows ({numbers.data}) "
            f"were scored in {numbers.precision}; the unquantised base's perplexity is "
            f"{numbers.logits.whole:.3f}."
        )
    return told


def left_out(numbers: ModelNumbers) -> list[str]:
    """Formats that some matrices cannot have, a sentence each."""
    return [
        f"{name}: {why}, so a block would span two rows, which training refuses; such matrices "
        "stay in 16 bits, in its size too, and are left out of its errors."
        for name, why in numbers.unfit.items()
    ]


def normal_or_not(numbers: ModelNumbers) -> str:
    """How many neurons are not normal, as a sentence; empty: none was tested."""
    share = non_normal_share(numbers.matrices)
    if share is None:
        return ""
    tested = sum(m.normality.neurons for m in numbers.matrices)
    return (
        f"Shapiro-Wilk at 5 % rejects {percent(share, 1)} of the neurons ({tested:,} were tested; "
        "5 % of normal ones fail by chance, and 7.5 % of LLaMA-7B's in the paper)."
    )


def worst_layers(numbers: ModelNumbers) -> str:
    """Which layers cost most, as one sentence; empty: there are too few of them."""
    layers = [layer for layer in numbers.layers if layer]
    if len(layers) <= LAYERS_NAMED:
        return ""
    if numbers.logits is not None and (asked := numbers.logits.by_layer):
        found = sorted(asked.items(), key=lambda item: -item[1].kl_divergence)[:LAYERS_NAMED]
        told = ", ".join(f"{name} (KL {nats(score)})" for name, score in found)
        return f"The layers that cost most when only one of them is quantised: {told}."
    errors = {layer: relative_rms(numbers.where(layer=layer), numbers.main) for layer in layers}
    worst = sorted(errors.items(), key=lambda item: -(item[1] or 0))[:LAYERS_NAMED]
    told = ", ".join(f"{name} ({percent(error)})" for name, error in worst)
    return f"The layers with the largest error of weights: {told}."


def no_yaml(numbers: ModelNumbers) -> str:
    """Why there are no lines for a run."""
    return f"No run can keep its base as {numbers.main.name}; name nf4, fp4 or int8 first."
