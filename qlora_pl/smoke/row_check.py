"""A run's first rows, read, encoded and judged as ``fit`` would; and one of them to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_pl.data.encoding.example import TracedExample
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.splits import BaseFacts, prepare_encoder
from qlora_pl.inspection.data.run_data import TRAIN, VAL, RowsOfRun
from qlora_pl.run_checks import settings
from qlora_pl.smoke.checklist import StepError
from qlora_pl.smoke.first_rows import MOST_ROWS, FirstRows

FEW = 8
"""Rows that validate, at most, where they are taken from the training rows."""
SHOWN_CHARACTERS = 700
"""Of a row."""
OPENING, CLOSING = "[[", "]]"
"""Around what is trained."""


@dataclass(frozen=True, kw_only=True)
class RowCheck:
    """What became of the first rows."""

    data: RowsOfRun
    """Set up."""
    num_rows: int
    """Training rows that were read."""
    is_whole: bool
    """Whether no source has more."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row before it is cut, both sides of a pair together."""
        reports = [split.report for split in self.data.read.values()]
        return max(report.longest + report.longest_target for report in reports)

    @property
    def has_validation(self) -> bool:
        """Whether a row validates."""
        return "val" in self.data.splits and len(self.data.splits["val"].rows) > 0

    def sentence(self) -> str:
        """What was read, in a clause."""
        report = self.data.read[TRAIN].report
        which = "all" if self.is_whole else "the first"
        num_sources = len(report.rows_by_source)
        of = f" of {num_sources} sources" if num_sources > 1 else ""
        formats = ", ".join(dict.fromkeys(report.formats.values()))
        said = (
            f"{which} {self.num_rows} rows{of}, read as {formats}; the longest has {self.longest} "
            "tokens"
        )
        if VAL in self.data.read:
            said += f"; {self.data.read[VAL].report.num_rows} validation rows"
        return said

    def notes(self) -> list[str]:
        """What would be judged on all rows."""
        report = self.data.read[TRAIN].report
        if self.is_whole or not report.num_lost_tokens:
            return []
        return [
            f"{report.lost_ratio:.1%} of the trained tokens of these rows do not fit into "
            f"{self.data.limits}; fit judges that on all rows (data.max_lost_ratio)."
        ]


def check_template(run: Any, base: Path, tokenizer: Path) -> str:
    """Load a run's template, and hold it against the tokenizer and the base.

    Args:
        run: The parsed configuration.
        base: A folder with the base's config.json.
        tokenizer: The folder of the tokenizer.

    Returns:
        What it is, in a clause.

    Raises:
        ConfigurationError: what ``fit`` would say of the template, or of the token that ends its
            answers.
    """
    facts = _facts(run, base)
    data = RowsOfRun(facts, 1, **settings(run.data) | {"tokenizer": str(tokenizer)})
    encoder = prepare_encoder(data, facts)
    ends = [repr(encoder.tokenizer.convert_ids_to_tokens(i)) for i in sorted(encoder.stop_ids)]
    return f"{encoder.template.name}; answers end with {' or '.join(ends)}"


def check_rows(run: Any, first: FirstRows, base: Path, tokenizer: Path) -> RowCheck:
    """Read the first rows with the run's own settings, at their full length.

    Args:
        run: The parsed configuration.
        first: Where the rows lie.
        base: A folder with the base's config.json.
        tokenizer: The folder of the tokenizer.

    Raises:
        QLoRAError: what ``fit`` would say of a row.
        StepError: why ``fit`` would not start on these rows.
    """
    own = settings(run.data) | {
        key: RowSources.parse(sources, f"data.{key}") for key, sources in first.sources.items()
    }
    own |= {"tokenizer": str(tokenizer), "cache": False, "window": None, "encoding_processes": 1}
    facts = _facts(run, base)
    # Of a part of the rows nobody knows which share of all is lost, nor whether enough are left.
    partly = own | {"max_lost_ratio": 1.0, "val_size": few(own["val_size"])}
    data = _read(facts, partly)
    counts = [sum(split.report.rows_by_source.values()) for split in data.read.values()]
    is_whole = not (first.stand_ins or first.streamed or first.sampled)
    is_whole &= max(counts) < MOST_ROWS  # no source has reached its limit
    if is_whole:
        data = _read(facts, own)
    if data.noted:
        raise StepError("\n".join(data.noted))
    num_rows = data.read[TRAIN].report.num_rows
    return RowCheck(data=data, num_rows=num_rows, is_whole=is_whole)


def _facts(run: Any, base: Path) -> BaseFacts:
    """What data has to know of the model, with its files where they lie now."""
    return replace(BaseFacts.of(run.model), name=str(base), revision=None, cache_dir=None)


def few(val_size: float) -> float:
    """Rows to validate on among a few hundred; a share stays what it is."""
    return min(val_size, FEW) if isinstance(val_size, int) else val_size


def _read(base: BaseFacts, own: dict[str, Any]) -> RowsOfRun:
    data = RowsOfRun(base, 1, **own)
    data.setup()
    return data


# -- one row ---------------------------------------------------------------------------------------


def shown_row(check: RowCheck) -> list[str]:
    """The first training row: how much of it is trained, and its text, marked; as lines."""
    split = check.data.splits["train"]
    (traced, *_) = check.data.encoder.trace(split.conversations[0])
    example = traced.example
    said = (
        f"in the first row {example.num_trained} of {len(example.input_ids)} tokens are trained, "
        f"what stands in {OPENING} {CLOSING}:"
    )
    text = "".join(_marked(traced))
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    return [said, *(f"| {line}" for line in text.splitlines())]


def _marked(traced: TracedExample) -> Iterator[str]:
    """The row's text, with brackets around what is trained."""
    done, is_open = 0, False
    for (start, end), is_trained in zip(traced.spans, traced.example.is_trained, strict=True):
        start = max(start, done)
        if end <= done:  # no character of its own: another token has shown it
            continue
        if bool(is_trained) != is_open:
            yield traced.text[done:start] + (OPENING if is_trained else CLOSING)
            done, is_open = start, bool(is_trained)
        yield traced.text[done:end]
        done = end
    yield (CLOSING if is_open else "") + traced.text[done:]
