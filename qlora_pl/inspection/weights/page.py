"""A quantisation report as one HTML page, with maps of layers and kinds of module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from qlora_pl.inspection.cells import bullets
from qlora_pl.inspection.pictures import bars, columns, heat_map
from qlora_pl.inspection.report_folder import tiles, whole_page
from qlora_pl.inspection.weights.measuring import (
    MatrixNumbers,
    relative_output_rms,
    relative_rms,
)
from qlora_pl.inspection.weights.normality import MOST_WEIGHTS, NEURONS, OUTLIER
from qlora_pl.inspection.weights.numbers import (
    ModelNumbers,
    beside_outliers_share,
    mean_kurtosis,
    non_normal_share,
)
from qlora_pl.inspection.weights.tables import (
    RANKED_BY,
    every_format_table,
    formats_table,
    kept_table,
    kinds_table,
    layers_table,
    left_out,
    megabytes,
    no_yaml,
    normal_or_not,
    opening,
    percent,
    worst_layers,
)

SUBJECT = "model"
DEFINITIONS = (
    "<b>Error of weights</b>: root of the summed squared error over the summed squared weights of "
    "all matrices. <b>If normal</b>: the same, expected of normal weights by numeric integration "
    "(without double quantisation). <b>Largest</b>: of a single weight, in the root mean square of "
    "its matrix.",
    "<b>Of outputs</b>: the same of X(W' - W) over XW, X the inputs that the unquantised model "
    "gives each module; the root of the mean over modules of its square.",
    "<b>KL</b>: of the unquantised base's next tokens to the quantised one's, nats a token, mean. "
    "<b>Same token</b>: both find the same likeliest.",
    "<b>nf4, fp4</b>: bitsandbytes, a float32 scale for each block; <b>DQ</b>: scales in 8 bits "
    "again. <b>int4</b>: plain rounding to 15 even steps of the block's largest weight; no run can "
    "keep its base so. <b>int8</b>: bitsandbytes' vectorwise codes, a scale a row; that LLM.int8 "
    "rounds inputs as well while it multiplies is not measured here.",
    "<b>Not normal</b>: neurons (rows, what makes one output) that Shapiro-Wilk rejects at 5 %, of "
    f"at most {NEURONS:,} of a matrix, over at most {MOST_WEIGHTS:,} weights of each. "
    "<b>Kurtosis</b>: mean over rows, above a normal distribution's. <b>Outliers</b>: weights "
    f"beyond {OUTLIER:g} standard deviations of their row; <b>beside one</b>: weights whose block "
    "of 64 holds one, which sets its scale.",
    "Matrices are decoded to float32; training decodes to the type of its products, whose rounding "
    "is a twentieth of a 4-bit code's.",
)


def page(numbers: ModelNumbers) -> str:
    """The whole page."""
    sections = {
        "formats": ("Ways to keep the matrices", _formats(numbers)),
        "keep": ("What to keep in 16 bits", _kept(numbers)),
        "logits": ("What each part costs", _logits(numbers)),
        "errors": ("Error by layer and kind", _errors(numbers)),
        "normality": ("How normal the weights are", _normality(numbers)),
        "definitions": ("Definitions", bullets(DEFINITIONS)),
    }
    title = f"{numbers.model}: what quantising costs"
    return whole_page(SUBJECT, title, _head(numbers), sections, numbers.version)


def _head(numbers: ModelNumbers) -> str:
    main = numbers.main
    shown = {
        "main format": main.name,
        "error of weights": percent(relative_rms(numbers.matrices, main)),
        "size of the matrices": megabytes(numbers.packed_bytes(main)),
    }
    if numbers.logits is not None:
        score = numbers.logits.by_format[main.name]
        shown["KL, nats a token"] = f"{score.kl_divergence:.4f}"
        shown["perplexity"] = f"{numbers.logits.whole:.2f} to {score.perplexity:.2f}"
    shown["neurons not normal"] = percent(non_normal_share(numbers.matrices), 1)
    return f'<p class="soft">{escape(opening(numbers))}</p>\n{tiles(shown)}'


def _formats(numbers: ModelNumbers) -> str:
    found = {f.name: relative_rms(numbers.matrices, f) for f in numbers.formats}
    errors = {name: error for name, error in found.items() if error is not None}
    expected = {f.name: numbers.expected_rms(f) for f in numbers.formats if f.name in errors}
    parts = [
        formats_table(numbers).html([f == numbers.main for f in numbers.formats]),
        "<h3>Relative error of weights; the stroke is what normal weights would have</h3>",
        bars(errors, lambda x: percent(x, 3), "Error of weights by format", expected),
    ]
    if numbers.logits is not None:
        divergence = {n: max(s.kl_divergence, 0.0) for n, s in numbers.logits.by_format.items()}
        parts += [
            "<h3>KL to the unquantised base, nats a token</h3>",
            bars(divergence, lambda x: f"{x:.4f}", "KL by format"),
        ]
    parts += [f"<p>{escape(sentence)}</p>" for sentence in left_out(numbers)]
    return "\n".join(parts)


def _kept(numbers: ModelNumbers) -> str:
    if not numbers.kept:
        return ""
    lines = (
        f"<p>As lines of a run's file:</p>\n<pre>{escape(numbers.yaml)}</pre>"
        if numbers.yaml
        else f"<p>{escape(no_yaml(numbers))}</p>"
    )
    return (
        f"<p>Modules that are best kept in 16 bits while the rest is {escape(numbers.main.name)}: "
        f"first what removes most for a byte of {escape(RANKED_BY[numbers.measure])}. Each row "
        f"keeps all above it as well.</p>\n{kept_table(numbers).html()}\n{lines}"
    )


def _logits(numbers: ModelNumbers) -> str:
    if numbers.logits is None or not numbers.logits.by_layer:
        return ""

    def words(x: float) -> str:
        return f"{x:.2g}"

    layers = {name: s.kl_divergence for name, s in numbers.logits.by_layer.items()}
    kinds = {name: max(s.kl_divergence, 0.0) for name, s in numbers.logits.by_kind.items()}
    return "\n".join(
        [
            "<p>KL to the unquantised base, nats a token, when only one part of it is "
            f"{escape(numbers.main.name)}. {escape(worst_layers(numbers))}</p>",
            "<h3>One layer</h3>",
            columns(layers, words, "KL by layer"),
            "<h3>One kind of module, in all layers</h3>",
            bars(kinds, words, "KL by kind"),
        ]
    )


def _errors(numbers: ModelNumbers) -> str:
    parts = [
        f"<p>All of {escape(numbers.main.name)}, but for the last table.</p>",
        "<h3>Error of weights</h3>",
    ]
    parts.append(
        _map(numbers, lambda some: relative_rms(some, numbers.main), percent, "Error of weights")
    )
    if any(m.output_squared_sum for m in numbers.matrices):
        parts += [
            "<h3>Error of outputs</h3>",
            _map(
                numbers,
                lambda some: relative_output_rms(some, numbers.main),
                percent,
                "Error of outputs",
            ),
        ]
    parts += [
        "<h3>By kind</h3>",
        kinds_table(numbers).html(),
        "<details><summary>By layer</summary>",
        layers_table(numbers).html(),
        "</details>",
        "<h3>Error of weights in every format</h3>",
        every_format_table(numbers, "kind").html(),
        "<details><summary>By layer</summary>",
        every_format_table(numbers, "layer").html(),
        "</details>",
    ]
    return "\n".join(parts)


def _normality(numbers: ModelNumbers) -> str:
    return "\n".join(
        [
            f"<p>{escape(normal_or_not(numbers))}</p>",
            "<h3>Share of neurons that are not normal</h3>",
            _map(numbers, non_normal_share, lambda x: percent(x, 0), "Neurons not normal"),
            "<h3>Kurtosis above a normal distribution's</h3>",
            _map(numbers, mean_kurtosis, lambda x: f"{x:+.2f}", "Kurtosis"),
            "<h3>Share of weights in a block with an outlier</h3>",
            _map(numbers, beside_outliers_share, percent, "Weights beside outliers"),
        ]
    )


def _map(
    numbers: ModelNumbers,
    measure: Callable[[Sequence[MatrixNumbers]], float | None],
    words: Callable[[float], str],
    label: str,
) -> str:
    values = {}
    for kind in numbers.kinds:
        for layer in numbers.layers:
            if some := numbers.where(layer, kind):
                values[kind, layer] = measure(some)
    return heat_map(numbers.kinds, numbers.layers, values, words, label)
