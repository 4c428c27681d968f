"""What became of the rows, in words: for the page, and in short for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_pl.data.rows.audit import DataReport
from qlora_pl.inspection.data.numbers import DataNumbers


def outcomes(report: DataReport) -> list[str]:
    """One line for each thing that happened to rows on their way; empty if all are kept whole."""
    told = {
        "bad rows, skipped": report.num_skipped,
        "rows cut": report.num_cut,
        "rows split into pieces": report.num_split,
        "rows left out": report.num_dropped,
        "of these without a trained token": report.num_untrained,
        "conversations of which each answer became a row": report.num_unrolled,
        "trained tokens that do not fit": report.num_lost_tokens,
        "answers that do not end in a trained stop token": report.num_unstopped,
        "tokens that cover a prompt's end and its answer's start": report.num_straddling,
        "messages that lost spaces at an end to the template": report.num_trimmed,
        "rows that spell a control token, trained as text": report.num_spelling_control,
    }
    lines = [f"{what}: {count:,}" for what, count in told.items() if count]
    for source, reasons in report.left_out.items():
        lines += [f"{source}: messages left out ({why}): {n:,}" for why, n in reasons.items()]
    lines += [f"skipped: {row}" for row in report.skipped]
    return [*lines, *(f"without a trained token: {place}" for place in report.untrained)]


def summary(numbers: DataNumbers) -> str:
    """A dozen lines for the terminal."""
    return "\n".join(_lines(numbers))


def _lines(numbers: DataNumbers) -> Iterator[str]:
    for source in numbers.sources:
        kept = f", {source.num_kept:,} kept" if source.num_kept != source.num_rows else ""
        yield f"{source.key}: {source.source}: {source.num_rows:,} rows{kept}, {source.format}"
    for key, report in numbers.reports.items():
        for line in outcomes(report):
            yield f"{key}: {line}"
    for name, split in numbers.splits.items():
        yield (
            f"{name}: {split.num_rows:,} rows, {split.num_tokens:,} tokens, "
            f"{split.num_trained_tokens:,} of them trained; longest row {split.longest:,}"
        )
    settings = numbers.settings
    stops = ", ".join(settings["stop tokens"])
    yield f"template {settings['template']}; answers stop at {stops}"
    yield from _length_lines(numbers)
    yield from _repetition_lines(numbers)
    for kind in numbers.odd:
        yield f"odd: {kind.name}: {kind.num_rows:,} (first: {kind.examples[0][0]})"


def _length_lines(numbers: DataNumbers) -> Iterator[str]:
    if not numbers.lengths.num_too_long:
        yield f"lengths: no training row is longer than {numbers.limits}"
        return
    lost = ", ".join(f"{p.overlong} {p.lost_ratio:.2%}" for p in numbers.policies)
    yield (
        f"lengths: training rows longer than {numbers.limits}: {numbers.lengths.num_too_long:,}; "
        f"trained tokens lost to each data.overlong: {lost}"
    )
    enough = next((p.sufficient_length for p in numbers.policies if p.is_chosen), None)
    if enough is not None:
        budget = numbers.limits.max_lost_ratio
        yield f"lengths: {numbers.limits.answer_key} {enough:,} loses no more than {budget:.1%}"


def _repetition_lines(numbers: DataNumbers) -> Iterator[str]:
    exact, similar, overlap = numbers.exact, numbers.similar, numbers.overlap
    yield (
        f"duplicates: exact: {exact.num_rows:,} training rows (groups: {exact.num_groups:,}); "
        f"near: {similar.num_rows:,} (groups: {similar.num_groups:,})"
    )
    if overlap is not None:
        yield (
            f"overlap: of {overlap.num_val:,} validation rows also in training: the whole row "
            f"{overlap.num_same_row:,}, nearly {overlap.num_similar_row:,}, the prompt "
            f"{overlap.num_same_prompt:,}"
        )
