"""Sources -> encoded rows on disk: read in order, encoded in processes, kept under a digest.

The digest covers the sources' bytes and everything that decides what becomes of them, the code
included, so that a changed template is never served stale rows.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache as cache_results
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.normalizing import OnError, ReadingReport, read_conversations
from qlora_pl.data.reading.source_digest import source_digest
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.audit import DataReport, check_split
from qlora_pl.data.rows.chunks import ChunkEncoder, Read
from qlora_pl.data.rows.encode_stream import encode_stream
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.data.rows.row_store import (
    Conversations,
    Places,
    RowWriter,
    StoredRows,
    digest_of,
    open_rows,
)
from qlora_pl.errors import ConfigurationError, TrainingStoppedError
from qlora_pl.files import TEMPORARY_PREFIX, atomic_folder

logger = logging.getLogger(__name__)


class EncodedSplit(NamedTuple):
    """The rows of a split that are kept, where each came from, and what the others were."""

    rows: EncodedRows
    places: Places
    conversations: Conversations
    report: DataReport

    def select(self, indices: Sequence[int] | np.ndarray) -> EncodedSplit:
        """These rows, in this order, with a report of their own."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = self.rows.select(chosen)
        are_pairs = self.report.longest_target > 0
        sources = rows.lengths - rows.num_trained if are_pairs else rows.lengths
        report = DataReport(
            formats=self.report.formats,
            num_rows=len(rows),
            num_tokens=int(rows.lengths.sum()),
            num_trained_tokens=int(rows.num_trained.sum()),
            longest=int(sources.max(initial=0)),
            longest_target=int(rows.num_trained.max(initial=0)) if are_pairs else 0,
        )
        return EncodedSplit(
            rows, self.places.select(chosen), self.conversations.select(chosen), report
        )


class Source(NamedTuple):
    """How rows are read."""

    sources: RowSources
    on_error: OnError = "stop"

    def conversations(self, report: ReadingReport) -> Iterator[Read]:
        """Every row in order, with the number of its source."""
        if self.sources.rows is not None:
            for place, conversation in read_conversations(self.sources, self.on_error, report):
                yield place, conversation, 0
        for number, source in enumerate(self.sources.sources):
            one = RowSources((source,))
            for place, conversation in read_conversations(one, self.on_error, report):
                yield place, conversation, number


class _Given(NamedTuple):
    """Rows that were read already."""

    reads: Sequence[Read]

    def conversations(self, report: ReadingReport) -> Iterator[Read]:
        report.num_rows.update(place.source for place, *_ in self.reads)
        return iter(self.reads)


def write_rows(
    folder: Path, source: Source | _Given, encode: ChunkEncoder, num_processes: int | None
) -> None:
    """Encode every row into a folder, with a progress bar where that takes longer than a second."""
    report, reading = DataReport(), ReadingReport()
    needed = np.zeros(0, np.int64)
    origins: Sequence[tuple[str, int]] = []
    with (
        RowWriter(folder) as writer,
        tqdm(desc="encoding", unit=" rows", delay=1.0, leave=False, disable=None) as bar,
    ):
        stream = source.conversations(reading)
        for origins, result in encode_stream(stream, encode, num_processes):  # noqa: B007
            writer.append(result.chunk)
            report.add(result.report)
            needed = sum_padded(needed, result.needed)
            bar.update(result.report.num_rows)
        report.add_reading(reading)
        writer.finish(origins, report.to_plain(), needed)


def sum_padded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two histograms, of which one may be shorter."""
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def prepare_reads(reads: Sequence[Read], encode: ChunkEncoder) -> tuple[EncodedSplit, np.ndarray]:
    """These rows alone, encoded and counted but not judged; and how many need which length."""
    stored = _unkept(lambda folder: write_rows(folder, _Given(reads), encode, 1))
    report = DataReport(**stored.report)
    return EncodedSplit(stored.rows, stored.places, stored.conversations, report), stored.needed


def prepare_split(
    sources: RowSources,
    encoder: Encoder,
    limits: Limits,
    key: str,
    cache: Path | None = None,
    num_processes: int | None = 1,
    on_error: OnError = "stop",
    noted: list[str] | None = None,
) -> EncodedSplit:
    """Read, encode and check every row, or take what an earlier run made of the same bytes.

    Args:
        sources: Where the rows come from.
        encoder: Renders and tokenises.
        limits: How long rows may be, and how much may be lost to that.
        key: The configuration key of these sources, for errors.
        cache: The folder of earlier results; None: nothing is kept.
        num_processes: See ``encode_stream``.
        on_error: See ``read_conversations``; counts for rows that the template refuses, too.
        noted: Where to write why the rows as a whole cannot be trained on, instead of raising it.

    Raises:
        DatasetFormatError: naming the first row that is not what its format says.
        ConfigurationError: if nothing is left to train on, or more is lost than the budget allows.
    """
    stored = _stored(Source(sources, on_error), encoder, limits, cache, num_processes)
    report = DataReport(**stored.report)
    try:
        check_split(report, stored.needed, limits, key, encoder.template.name)
    except ConfigurationError as error:
        if noted is None:
            raise
        noted += error.problems
    return EncodedSplit(stored.rows, stored.places, stored.conversations, report)


def _stored(
    source: Source,
    encoder: Encoder,
    limits: Limits,
    cache: Path | None,
    num_processes: int | None,
) -> StoredRows:
    def write(folder: Path) -> None:
        encode = ChunkEncoder(encoder, limits, skips=source.on_error == "skip")
        write_rows(folder, source, encode, num_processes)

    if cache is None or source.sources.rows is not None or not is_writable(cache / "data"):
        return _unkept(write)
    folder = cache / "data" / digest_of(_what_decides(source, encoder, limits))[:32]
    if (stored := open_rows(folder)) is not None:
        logger.info("Encoded rows of an earlier run are used (%s).", folder)
        return stored
    shutil.rmtree(folder, ignore_errors=True)  # whatever is there is damaged
    _remove_old_leftovers(folder.parent)
    try:
        with atomic_folder(folder) as temporary:
            write(temporary)
            stored = _read_back(temporary)  # what is mapped outlives its name
    except TrainingStoppedError:
        # Another process may have written the same rows in the meantime.
        if (stored := stored or open_rows(folder)) is None:
            raise
    assert stored is not None
    return stored


def _unkept(write: Callable[[Path], None]) -> StoredRows:
    """Rows in files without a name."""
    with tempfile.TemporaryDirectory(prefix="qlora_pl-", ignore_cleanup_errors=True) as name:
        try:
            write(Path(name))
        except OSError as error:
            raise TrainingStoppedError(
                f"Encoded rows could not be written to '{name}' ({error.strerror}); free some "
                "space, or set TMPDIR to a folder with more."
            ) from error
        return _read_back(Path(name))  # what is mapped outlives its name


def _read_back(folder: Path) -> StoredRows:
    """The rows that have just been written.

    Raises:
        TrainingStoppedError: if they are not what was written.
    """
    try:
        stored = open_rows(folder)
    except OSError as error:
        raise TrainingStoppedError(
            f"Encoded rows cannot be read back from '{folder}' ({error.strerror}); check the disk."
        ) from error
    if stored is None:
        raise TrainingStoppedError(
            f"Encoded rows cannot be read back from '{folder}' as they were written; check the "
            "disk."
        )
    return stored


@cache_results
def is_writable(folder: Path) -> bool:
    """Whether files can be made there, found out by making one; says so once where not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        logger.warning(
            "Encoded rows are not kept: '%s' cannot be written to (%s). Set QLORA_PL_CACHE to a "
            "folder that can.",
            folder,
            error.strerror,
        )
        return False


def _what_decides(source: Source, encoder: Encoder, limits: Limits) -> Iterator[str | bytes]:
    for config in source.sources.sources:
        settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "weight"}
        yield json.dumps(settings, sort_keys=True, default=str)
        yield source_digest(config)
    yield source.on_error
    yield json.dumps(encoder.definition(), sort_keys=True)
    yield encoder.tokenizer.backend_tokenizer.to_str()
    yield json.dumps(encoder.tokenizer.special_tokens_map, sort_keys=True, default=str)
    yield json.dumps([limits.max_length, limits.max_target_length, limits.overlong])
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        yield path.read_bytes()
    for name in ("tokenizers", "transformers", "numpy"):
        yield f"{name} {version(name)}"


def _remove_old_leftovers(folder: Path) -> None:
    """Clear away what processes that were killed more than a day ago left behind."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path, ignore_errors=True)
