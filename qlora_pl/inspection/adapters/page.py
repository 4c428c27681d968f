"""What an adapter changes as one HTML page, with maps of layers and kinds of module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html import escape

from qlora_pl.inspection.adapters.numbers import DEAD, EXPLODING, AdapterNumbers, PairNumbers
from qlora_pl.inspection.adapters.spectra import NEGLIGIBLE
from qlora_pl.inspection.adapters.tables import (
    biases_words,
    found_words,
    groups_table,
    likeness_words,
    mean_of,
    norm_of,
    opening,
    others_words,
    rank_of,
    share_of,
    share_words,
)
from qlora_pl.inspection.cells import bullets
from qlora_pl.inspection.pictures import heat_map
from qlora_pl.inspection.report_folder import tiles, whole_page

SUBJECT = "adapter"
DEFINITIONS = (
    "<b>Norm of BA</b>: Frobenius norm of scale x BA, the scale being alpha / r, or alpha / "
    "sqrt(r) with rsLoRA, ranks and alphas of patterns included. From the thin factors.",
    "<b>Share of the weight</b>: the norm of the change over the norm of the base's matrix. With "
    "DoRA the change is that of the whole matrix, its rows' lengths included.",
    "<b>Effective rank</b>: exp of the entropy of the singular values of BA, each as a share of "
    "their sum (Roy and Vetterli, 2007); r if all are equal. <b>Stable rank</b>: squared norm over "
    f"the squared largest singular value. <b>In use</b>: singular values above {NEGLIGIBLE:g} of "
    "the largest.",
    f"<b>Dead</b>: B or A exactly zero, or a norm below {DEAD:g} of the median of its kind. "
    f"<b>Exploding</b>: more than {EXPLODING:g} times that median, or more than the weight itself.",
    "<b>Cosine</b>: of two adapters' scale x BA, as vectors; 0 for changes that have nothing to do "
    "with each other.",
)


def page(numbers: AdapterNumbers) -> str:
    """The whole page."""
    sections = {
        "findings": ("What is worth a look", _findings(numbers)),
        "size": ("How much is changed", _size(numbers)),
        "rank": ("In how many directions", _ranks(numbers)),
        "likeness": ("Beside the other adapter", _likeness(numbers)),
        "rest": ("Biases and whole layers", _rest(numbers)),
        "tables": ("Tables", _tables(numbers)),
        "definitions": ("Definitions", bullets(DEFINITIONS)),
    }
    title = f"{numbers.adapter}: what it changes"
    return whole_page(SUBJECT, title, _head(numbers), sections, numbers.version)


def _head(numbers: AdapterNumbers) -> str:
    pairs = numbers.pairs
    shown = {"modules": f"{len(pairs):,}"}
    if (share := mean_of(pairs, share_of)) is not None:
        shown["mean share of the weight"] = share_words(share)
    if (norm := mean_of(pairs, norm_of)) is not None:
        shown["mean norm of BA"] = f"{norm:.4g}"
    if (effective := mean_of(pairs, rank_of)) is not None:
        ranks = {p.rank for p in pairs}
        of = f" of {ranks.pop()}" if len(ranks) == 1 else ""
        shown["mean effective rank"] = f"{effective:.1f}{of}"
    if numbers.likeness is not None and numbers.likeness.whole is not None:
        shown["cosine to the other"] = f"{numbers.likeness.whole:+.4f}"
    told = found_words(numbers)
    verdict = "No matrix is dead, exploding or no number."
    if told:
        verdict = f"{len(numbers.damage) + len(numbers.findings):,} things are worth a look."
    kind = "verdict bad" if numbers.damage else "verdict"
    return (
        f'<p class="soft">{escape(opening(numbers))}</p>\n'
        f'<div class="{kind}">{escape(verdict)}</div>\n{tiles(shown)}'
    )


def _findings(numbers: AdapterNumbers) -> str:
    told = [*found_words(numbers), *numbers.notes]
    return bullets(map(escape, told)) if told else ""


def _size(numbers: AdapterNumbers) -> str:
    parts = ["<h3>Norm of BA</h3>", _map(numbers, norm_of, lambda x: f"{x:.3g}", "Norm of BA")]
    if any(p.change is not None for p in numbers.pairs):
        parts += [
            "<h3>Share of the weight</h3>",
            _map(numbers, share_of, share_words, "Share of the weight"),
        ]
    return "\n".join(parts)


def _ranks(numbers: AdapterNumbers) -> str:
    picture = _map(numbers, rank_of, lambda x: f"{x:.1f}", "Effective rank")
    return f"<h3>Effective rank of BA</h3>\n{picture}"


def _likeness(numbers: AdapterNumbers) -> str:
    if (likeness := numbers.likeness) is None:
        return ""

    def cosine(pair: PairNumbers) -> float | None:
        return likeness.cosines.get(pair.module)

    # Those that the other does not have stay blank.
    shared = replace(numbers, pairs=[p for p in numbers.pairs if p.module in likeness.cosines])
    picture = _map(shared, cosine, lambda x: f"{x:+.3f}", "Cosine")
    return f"<p>{escape(likeness_words(likeness))}</p>\n<h3>Cosine</h3>\n{picture}"


def _rest(numbers: AdapterNumbers) -> str:
    told = [biases_words(numbers)] if numbers.biases else []
    told += [others_words(numbers)] if numbers.others else []
    return "\n".join(f"<p>{escape(sentence)}</p>" for sentence in told)


def _tables(numbers: AdapterNumbers) -> str:
    return (
        f"<h3>By kind of module</h3>\n{groups_table(numbers, 'kind').html()}\n"
        f"<h3>By layer</h3>\n{groups_table(numbers, 'layer').html()}"
    )


def _map(
    numbers: AdapterNumbers,
    measure: Callable[[PairNumbers], float | None],
    words: Callable[[float], str],
    label: str,
) -> str:
    values = {}
    for kind in numbers.kinds:
        for layer in numbers.layers:
            if some := [p for p in numbers.pairs if p.place == (layer, kind)]:
                values[kind, layer] = mean_of(some, measure)
    return heat_map(numbers.kinds, numbers.layers, values, words, label)
