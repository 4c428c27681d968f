"""Every number of the page, in plain types: what ``--json`` prints and what the page is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from qlora_pl import __version__
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.places import Place
from qlora_pl.data.rows.audit import DataReport
from qlora_pl.data.rows.preparation import EncodedSplit
from qlora_pl.inspection.data.duplicates import alike, same
from qlora_pl.inspection.data.first_batch import BatchPicture, first_batch
from qlora_pl.inspection.data.odd_rows import OddKind, find_odd_rows
from qlora_pl.inspection.data.policies import PolicyLosses, has_two_limits, policy_losses
from qlora_pl.inspection.data.repetition import Overlap, Repetition, overlap, repetition, within
from qlora_pl.inspection.data.run_data import TRAIN, Documents, RunData, whole_documents
from qlora_pl.inspection.data.wording import count_letters, prompt_wording, wording

PERCENTILES = (50, 90, 95, 99, 100)
NUM_BINS = 60


class SourceNumbers(NamedTuple):
    """What one file or dataset gave."""

    key: str
    """The configuration key that names it."""
    source: str
    format: str
    num_rows: int
    """Conversations that can be trained on, before ``data.max_length``."""
    num_kept: int
    """Rows that the run keeps; a row of the source may become several."""


class SplitNumbers(NamedTuple):
    """What a run trains or validates on, after all that is cut or left out."""

    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    longest: int


class Lengths(NamedTuple):
    """Tokens of the rows before ``data.max_length``."""

    edges: list[int]
    """Of the bins: bin i counts lengths from ``edges[i]`` to ``edges[i + 1] - 1``; the last one may
    be wider than the others."""
    counts: list[int]
    percentiles: dict[str, int]
    num_too_long: int


@dataclass(frozen=True, kw_only=True)
class DataNumbers:
    """All that is told about the data of a run."""

    run: str
    version: str
    problems: list[str]
    settings: dict[str, Any]
    limits: Limits
    is_paired: bool
    """Whether question and answer have a limit each."""
    sources: list[SourceNumbers]
    reports: dict[str, DataReport]
    splits: dict[str, SplitNumbers]
    lengths: Lengths
    policies: list[PolicyLosses]
    exact: Repetition
    similar: Repetition
    overlap: Overlap | None
    odd: list[OddKind]
    letters: dict[str, int]
    batch: BatchPicture | None

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    """A named tuple as a mapping, and all that is in it."""
    if isinstance(value, DataReport | Limits):
        return asdict(value)
    if isinstance(value, Place):
        return str(value)
    if hasattr(value, "_asdict"):
        return {name: _plain(inner) for name, inner in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def measure(run: RunData) -> tuple[DataNumbers, dict[str, Documents]]:
    """All numbers of a run's data, and the conversations that they were taken from."""
    documents = whole_documents(run)
    conversations = [c for some in documents.values() for _, c in some]
    places = [place for some in documents.values() for place in some.places]
    texts = [wording(c) for c in conversations]
    num_train = len(documents["train"])
    exact = same([(c.messages, c.is_plain_text) for c in conversations[:num_train]])
    similar = alike(texts)
    prompts = [prompt_wording(c) for c in conversations]
    policies = policy_losses(run.whole[TRAIN], run.data.encoder, run.data.limits)
    numbers = DataNumbers(
        run=run.name,
        version=__version__,
        problems=run.problems,
        settings=_settings(run),
        limits=run.data.limits,
        is_paired=has_two_limits(run.data.encoder, run.data.limits),
        sources=_sources(run),
        reports={key: split.report for key, split in run.data.read.items()},
        splits={name: _split(split) for name, split in run.data.splits.items()},
        lengths=_lengths(run.whole[TRAIN], policies, run.data.max_length),
        policies=policies,
        exact=repetition(exact, texts, places),
        similar=repetition(within(similar, num_train), texts, places),
        overlap=(
            overlap(texts, prompts, similar, num_train, places) if "val" in documents else None
        ),
        odd=find_odd_rows(
            zip(places, conversations, strict=True), run.data.encoder.control_pattern
        ),
        letters=count_letters(
            text for c in conversations for m in c.messages for text in (m.content, m.context)
        ),
        batch=first_batch(run.data),
    )
    return numbers, documents


# -- what was read ---------------------------------------------------------------------------------


def _settings(run: RunData) -> dict[str, Any]:
    data = run.data
    encoder, tokenizer = data.encoder, data.tokenizer
    stops = {tokenizer.convert_ids_to_tokens(i): i for i in sorted(encoder.stop_ids)}
    first = (
        encoder.encode([run.whole[TRAIN].conversations[0]]) if len(run.whole[TRAIN].rows) else []
    )
    return {
        "template": data.template.name,
        "tokenizer": str(tokenizer.name_or_path),
        "vocabulary": len(tokenizer),
        "stop tokens": stops,
        "BOS token": (
            {tokenizer.bos_token: tokenizer.bos_token_id} if tokenizer.bos_token else None
        ),
        "BOS tokens that begin a row": first[0][0].num_bos if first else 0,
        "padding token": {tokenizer.pad_token: tokenizer.pad_token_id},
        "data.max_length": data.max_length,
        "data.max_target_length": data.max_target_length,
        "data.overlong": data.overlong,
        "data.max_lost_ratio": data.max_lost_ratio,
        "data.train_on": data.train_on,
        "data.append_eos": data.append_eos,
        "data.encoding": data.encoding,
        "data.on_error": data.on_error,
        "data.batch_size": data.asked_batch_size,
        "data.tokens_per_batch": data.tokens_per_batch,
        "data.packing": data.packing,
        "data.group_by_length": data.group_by_length,
    }


def _sources(run: RunData) -> list[SourceNumbers]:
    lines = []
    for key, split in run.data.read.items():
        whole = Counter(place.source for place in Documents(run.whole[key]).places)
        kept = Counter(place.source for place in split.places)
        for source, count in whole.items():
            format = _format_of(source, split.report.formats)
            lines.append(SourceNumbers(key, source, format, count, kept[source]))
    return lines


def _format_of(source: str, formats: Mapping[str, str]) -> str:
    """The format of a file, which its source may name by a folder or a pattern."""
    return formats.get(source) or "; ".join(dict.fromkeys(formats.values()))


def _split(split: EncodedSplit) -> SplitNumbers:
    rows = split.rows
    tokens, trained = int(rows.lengths.sum()), int(rows.num_trained.sum())
    return SplitNumbers(len(rows), tokens, trained, int(rows.lengths.max(initial=0)))


def _lengths(whole: EncodedSplit, policies: list[PolicyLosses], max_length: int) -> Lengths:
    lengths = whole.rows.lengths
    if not len(lengths):
        return Lengths([0, 1], [0], {}, 0)
    percentiles = {
        str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in PERCENTILES
    }
    longest = int(lengths.max())
    # A few rows that are much longer than all others would leave one bar for these.
    end = min(longest, max(2 * max_length, percentiles["99"] * 5 // 4))
    width = -(-(end + 1) // NUM_BINS)
    edges = np.arange(0, end + width + 1, width)
    edges[-1] = max(edges[-1], longest + 1)
    counts = np.histogram(lengths, edges)[0]
    too_long = next(p.num_left_out for p in policies if p.overlong == "drop")
    return Lengths(edges.tolist(), counts.tolist(), percentiles, too_long)
