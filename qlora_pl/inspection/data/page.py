"""The numbers and the shown rows -> one HTML page that needs nothing else: no script, no network.

Everything that comes from the data or the configuration is escaped on its way in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from qlora_pl.inspection.cells import as_code, bullets, emphasised, excerpt, places, table
from qlora_pl.inspection.data.drawings import LINES_SHOWN, batch_drawing, histogram
from qlora_pl.inspection.data.numbers import DataNumbers
from qlora_pl.inspection.data.outcomes import outcomes
from qlora_pl.inspection.data.repetition import DEFINITIONS, Repetition
from qlora_pl.inspection.data.token_markup import tokens_markup
from qlora_pl.inspection.data.traced_rows import ShownRow
from qlora_pl.inspection.report_folder import signature

SECTIONS = {
    "sources": "Sources",
    "lengths": "Lengths",
    "rows": "Rows, token by token",
    "batch": "The first batch",
    "repeated": "Duplicates and overlap",
    "odd": "Odd rows",
    "scripts": "Scripts",
    "settings": "Settings",
}


def page(numbers: DataNumbers, rows: Sequence[ShownRow]) -> str:
    """The whole page."""
    contents = {
        "sources": _sources(numbers),
        "lengths": _lengths(numbers),
        "rows": _rows(rows),
        "batch": _batch(numbers),
        "repeated": _repeated(numbers),
        "odd": _odd(numbers),
        "scripts": _scripts(numbers),
        "settings": _settings(numbers),
    }
    sections = [
        f'<section id="{name}">\n<h2>{title}</h2>\n{contents[name]}\n</section>'
        for name, title in SECTIONS.items()
    ]
    footer = f"<footer>Written by qlora-pl {escape(numbers.version)} inspect data.</footer>"
    folder = files("qlora_pl.inspection")
    return Template((folder / "page.html").read_text("utf-8")).substitute(
        signature=signature("data"),
        title=escape(f"{numbers.run}: what is trained on"),
        style=(folder / "page.css").read_text("utf-8"),
        body="\n".join([_head(numbers), *sections, footer]),
    )


def _head(numbers: DataNumbers) -> str:
    if numbers.problems:
        verdict = f"<b>fit would not start.</b>{bullets(map(escape, numbers.problems))}"
    else:
        verdict = "fit would start on these rows."
    train, val = numbers.splits.get("train"), numbers.splits.get("val")
    tiles: list[tuple[str, str]] = []
    if train is not None and train.num_tokens:
        share = train.num_trained_tokens / train.num_tokens
        tiles += [
            ("training rows", f"{train.num_rows:,}"),
            ("tokens", f"{train.num_tokens:,}"),
            ("of them trained", f"{train.num_trained_tokens:,} ({share:.0%})"),
        ]
    if val is not None:
        tiles.append(("validation rows", f"{val.num_rows:,}"))
    for key, report in numbers.reports.items():
        name = "" if key == "data.sources" else " (validation)"
        tiles.append((f"trained tokens lost{name}", f"{report.lost_ratio:.2%}"))
    tiles.append(("longest row", f"{numbers.lengths.percentiles.get('100', 0):,}"))
    shown = "".join(f"<li><b>{value}</b><span>{escape(name)}</span></li>" for name, value in tiles)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in SECTIONS.items())
    return (
        f"<header>\n<h1>{emphasised(numbers.run)}: what is trained on</h1>\n"
        f'<div class="verdict{" bad" if numbers.problems else ""}">{verdict}</div>\n'
        f'<ul class="tiles">{shown}</ul>\n<nav>{links}</nav>\n</header>'
    )


# -- sections --------------------------------------------------------------------------------------


def _sources(numbers: DataNumbers) -> str:
    named = table(
        ("key", "source", "format", "#rows", "#rows kept"),
        [
            (f"<code>{s.key}</code>", as_code(s.source), escape(s.format), s.num_rows, s.num_kept)
            for s in numbers.sources
        ],
    )
    lines = [
        f"<div><code>{key}</code>: {bullets(map(escape, told))}</div>"
        if (told := outcomes(report))
        else f"<div><code>{key}</code>: every row is kept whole.</div>"
        for key, report in numbers.reports.items()
    ]
    return named + "\n".join(lines)


def _lengths(numbers: DataNumbers) -> str:
    lengths = numbers.lengths
    cut_off = None if numbers.is_paired else numbers.limits.max_length
    whose = " (question and answer together; each has a limit)" if numbers.is_paired else ""
    budget = numbers.limits.max_lost_ratio
    told = "; ".join(
        f"{'the longest' if p == '100' else f'{p} % up to'} {tokens:,}"
        for p, tokens in lengths.percentiles.items()
    )
    ways = table(
        (
            "data.overlong",
            "#trained tokens lost",
            "#share",
            "#rows left out",
            "#rows without an end",
            f"#{numbers.limits.answer_key.removeprefix('data.')} for {budget:.1%}",
        ),
        [
            (
                f"<code>{p.overlong}</code>{' (this run)' if p.is_chosen else ''}",
                p.num_lost_tokens,
                f"{p.lost_ratio:.2%}",
                p.num_left_out,
                p.num_endless,
                "any" if p.sufficient_length is None else p.sufficient_length,
            )
            for p in numbers.policies
        ],
        chosen=[p.is_chosen for p in numbers.policies],
    )
    return (
        f'<div class="wide">{histogram(lengths, cut_off)}</div>\n'
        f"<p>Training rows by their tokens{whose}, before anything is cut: {told}. "
        f"Longer than <code>{numbers.limits}</code>: {lengths.num_too_long:,}.</p>\n"
        f"<p>What each way with long rows takes away at this length:</p>\n{ways}\n"
        '<p class="note">Rows without an end are left of long rows and do not end in a stop token '
        "that is trained. The last column is the smallest limit that loses "
        "no more than <code>data.max_lost_ratio</code> of the trained tokens; <code>split</code> "
        "keeps them at any length.</p>"
    )


def _rows(rows: Sequence[ShownRow]) -> str:
    legend = (
        '<p class="legend"><span><span class="token trained">trained</span></span>'
        '<span><span class="token">read, not trained</span></span>'
        '<span><span class="token special">control token</span></span>'
        '<span><span class="token lost">left out: too long</span></span></p>'
        '<p class="note">One box is one token; point at it for its id. Spaces are dotted; a bar is '
        "a further token of one character.</p>"
    )
    return legend + "".join(map(_row, rows))


def _row(row: ShownRow) -> str:
    tokens = [token for token in row.tokens if token.id is not None]
    told = [f"{len(tokens):,} tokens, {sum(t.is_trained for t in tokens):,} trained"]
    if lost := sum(token.is_lost for token in tokens):
        lost_trained = sum(token.is_lost and token.is_trained for token in tokens)
        told.append(f"{lost:,} are left out, {lost_trained:,} of them trained")
    if row.num_pieces != 1:
        told.append(f"the run makes {row.num_pieces or 'no'} rows of it")
    return (
        f'<article class="row">\n<h3>{escape(str(row.place))} '
        f'<span class="soft">({escape(row.split)}): {escape(row.reason)}</span></h3>\n'
        f'<p class="note">{"; ".join(told)}.</p>\n'
        f'<div class="tokens" dir="auto">{tokens_markup(row)}</div>\n'
        "<details><summary>The exact text, as JSON</summary>"
        f"<pre>{escape(json.dumps(row.text))}</pre></details>\n</article>\n"
    )


def _batch(numbers: DataNumbers) -> str:
    batch = numbers.batch
    if batch is None:
        return "<p>There is no row to train on.</p>"
    total = batch.width * len(batch.lines)
    more = len(batch.lines) - LINES_SHOWN
    shown = f" The first {LINES_SHOWN} lines are drawn." if more > 0 else ""
    is_packed = batch.num_rows > len(batch.lines)
    if numbers.settings["data.packing"] == "auto":
        shown += " With packing auto the model decides; these are rows as they are if it cannot."
    packed = " A stroke is where the next row of a pack begins." if is_packed else ""
    return (
        f"<p>The first micro-batch of one device: {batch.num_rows:,} rows in {len(batch.lines):,} "
        f"lines of {batch.width:,} tokens; {batch.num_trained / total:.1%} of its {total:,} places "
        f"are trained, {batch.num_padding / total:.1%} are padding.{packed}{shown}</p>\n"
        '<p class="legend"><span><span class="swatch trained"></span>trained</span>'
        '<span><span class="swatch read"></span>read</span>'
        '<span><span class="swatch"></span>padding</span></p>\n'
        f'<div class="wide">{batch_drawing(batch)}</div>'
    )


def _repeated(numbers: DataNumbers) -> str:
    parts = [
        "<h3>Exact duplicates</h3>",
        _repetition(numbers.exact, DEFINITIONS["exact"]),
        "<h3>Near-duplicates</h3>",
        _repetition(numbers.similar, DEFINITIONS["similar"]),
    ]
    if (overlap := numbers.overlap) is None:
        return "\n".join(parts)
    parts += [
        "<h3>Validation rows that are trained on</h3>",
        f'<p class="note">{escape(DEFINITIONS["overlap"])}</p>',
        f"<p>Of {overlap.num_val:,} validation rows also in training: the whole row "
        f"{overlap.num_same_row:,}; the whole row or nearly {overlap.num_similar_row:,}; the "
        f"prompt {overlap.num_same_prompt:,}.</p>",
    ]
    if overlap.examples:
        head = ("validation row", "training row", "they share")
        rows = [(escape(val), escape(train), what) for val, train, what in overlap.examples]
        parts.append(table(head, rows))
    return "\n".join(parts)


def _repetition(found: Repetition, definition: str) -> str:
    told = (
        f"<p>Training rows in such groups: {found.num_rows:,}; groups: {found.num_groups:,}; rows "
        f"that say nothing new: {found.num_rows - found.num_groups:,}.</p>"
        if found.num_groups
        else "<p>None among the training rows.</p>"
    )
    parts = [f'<p class="note">{escape(definition)}</p>', told]
    if found.groups:
        rows = [
            (
                g.num_rows,
                f"{g.similarity:.0%}",
                places(g.places, g.num_rows),
                f'<span class="excerpt" dir="auto">{escape(g.excerpt)}</span>',
            )
            for g in found.groups
        ]
        parts.append(table(("#rows", "#alike", "file: rows", "how it begins, levelled"), rows))
    return "\n".join(parts)


def _odd(numbers: DataNumbers) -> str:
    if not numbers.odd:
        return "<p>None of the kinds that are looked for.</p>"
    rows = [
        (
            f'<b>{escape(kind.name)}</b><br><span class="note">{escape(kind.definition)}</span>',
            kind.num_rows,
            bullets(
                f'{escape(str(place))}: <code class="excerpt" dir="auto">{excerpt(text)}</code>'
                for place, text in kind.examples
            ),
        )
        for kind in numbers.odd
    ]
    return table(("kind", "#rows", "the first of them"), rows)


def _scripts(numbers: DataNumbers) -> str:
    total = max(sum(numbers.letters.values()), 1)
    rows = [
        (
            escape(name),
            count,
            f"{count / total:.2%}",
            f'<span class="bar" style="width:{max(count / total * 18, 0.1):.2f}rem"></span>',
        )
        for name, count in numbers.letters.items()
    ]
    said = "<p>Letters of training and validation rows by the Unicode block that they are in.</p>"
    return said + table(("script", "#letters", "#share", ""), rows)


def _settings(numbers: DataNumbers) -> str:
    return table(
        ("setting", "value"), [(escape(n), as_code(v)) for n, v in numbers.settings.items()]
    )
