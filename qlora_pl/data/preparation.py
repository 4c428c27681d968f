"""Sources -> encoded rows on disk: read in order, encoded in processes, kept under a digest.

The digest covers the sources' bytes and everything that decides what becomes of them, the code
included, so that a changed template is never served stale rows.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache as cache_results
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from qlora_pl.data.audit import DataReport, Limits, check_split
from qlora_pl.data.chunks import ChunkEncoder, ChunkResult, Read
from qlora_pl.data.encoded_rows import EncodedRows
from qlora_pl.data.encoding import TOKENIZER_CHUNK, Encoder
from qlora_pl.data.normalizing import conversations, source_digest
from qlora_pl.data.row_store import (
    Conversations,
    Places,
    RowWriter,
    StoredRows,
    digest_of,
    open_rows,
)
from qlora_pl.data.sources import RowSources
from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import TEMPORARY_PREFIX, atomic_folder

logger = logging.getLogger(__name__)

CHUNKS_BEFORE_PROCESSES = 16
"""Chunks that are encoded here before processes are started, which takes longer than those do."""
MAX_PROCESSES = 8


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
        report = DataReport(
            formats=self.report.formats,
            num_rows=len(rows),
            num_tokens=int(rows.lengths.sum()),
            num_trained_tokens=int(rows.num_trained.sum()),
            longest=int(rows.lengths.max(initial=0)),
        )
        return EncodedSplit(
            rows, self.places.select(chosen), self.conversations.select(chosen), report
        )


def encode_stream(
    stream: Iterable[Read], encode: ChunkEncoder, num_processes: int | None
) -> Iterator[tuple[list[str], ChunkResult]]:
    """Chunk by chunk, in order, with the names of the sources so far.

    Args:
        stream: Conversations with their places.
        encode: What to do with a chunk.
        num_processes: 1: all here; None: as many as there are processors, up to 8, once it is
            worth while.
    """
    sources: list[str] = []
    chunks = _numbered(stream, sources)
    for chunk, numbers in islice(chunks, CHUNKS_BEFORE_PROCESSES if num_processes != 1 else None):
        yield sources, encode(chunk, numbers)
    wanted = num_processes or min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    if wanted == 1 or "fork" not in get_all_start_methods():
        for chunk, numbers in chunks:
            yield sources, encode(chunk, numbers)
        return
    with _processes(encode, wanted) as pool:
        waiting: deque[Future[ChunkResult]] = deque()
        for chunk, numbers in chunks:
            waiting.append(pool.submit(_encode_there, chunk, numbers))
            if len(waiting) > 2 * wanted:
                yield sources, waiting.popleft().result()
        while waiting:
            yield sources, waiting.popleft().result()


def _numbered(stream: Iterable[Read], sources: list[str]) -> Iterator[tuple[list[Read], list[int]]]:
    numbers: dict[str, int] = {}
    iterator = iter(stream)
    while chunk := list(islice(iterator, TOKENIZER_CHUNK)):
        for place, _ in chunk:
            if place.source not in numbers:
                numbers[place.source] = len(sources)
                sources.append(place.source)
        yield chunk, [numbers[place.source] for place, _ in chunk]


_encoder_of_this_process: ChunkEncoder | None = None


@contextmanager
def _processes(encode: ChunkEncoder, number: int) -> Iterator[ProcessPoolExecutor]:
    # Threads of the tokenizer inside processes would fight for the same processors.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with ProcessPoolExecutor(number, get_context("fork"), _start_process, (encode,)) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise TrainingStoppedError(
            "A process that encodes rows was killed, most likely because memory ran out; set "
            "data.encoding_processes: 1, or a smaller number than now."
        ) from error
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start_process(encode: ChunkEncoder) -> None:
    global _encoder_of_this_process
    _encoder_of_this_process = encode


def _encode_there(chunk: Sequence[Read], numbers: Sequence[int]) -> ChunkResult:
    assert _encoder_of_this_process is not None
    return _encoder_of_this_process(chunk, numbers)


def write_rows(
    folder: Path,
    stream: Iterable[Read],
    encode: ChunkEncoder,
    report: DataReport,
    num_processes: int | None,
) -> None:
    """Encode a stream into a folder, with a progress bar where that takes longer than a second."""
    needed = np.zeros(0, np.int64)
    sources: Sequence[str] = []
    with (
        RowWriter(folder) as writer,
        tqdm(desc="encoding", unit=" rows", unit_scale=True, delay=1.0, leave=False) as bar,
    ):
        for sources, result in encode_stream(stream, encode, num_processes):  # noqa: B007
            writer.append(result.chunk)
            report.add(result.report)
            needed = _sum_padded(needed, result.needed)
            bar.update(result.report.num_rows)
        writer.finish(sources, report.to_plain(), needed)


def _sum_padded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def prepare_split(
    sources: RowSources,
    encoder: Encoder,
    limits: Limits,
    key: str,
    cache: Path | None = None,
    num_processes: int | None = 1,
) -> EncodedSplit:
    """Read, encode and check every row, or take what an earlier run made of the same bytes.

    Args:
        sources: Where the rows come from.
        encoder: Renders and tokenises.
        limits: How long rows may be, and how much may be lost to that.
        key: The configuration key of these sources, for errors.
        cache: The folder of earlier results; None: nothing is kept.
        num_processes: See ``encode_stream``.

    Raises:
        DatasetFormatError: naming the first row that is not what its format says.
        ConfigurationError: if nothing is left to train on, or more is lost than the budget allows.
    """
    stored = _stored(sources, encoder, limits, cache, num_processes)
    report = DataReport(**stored.report)
    check_split(report, stored.needed, limits, key, encoder.template.name)
    return EncodedSplit(stored.rows, stored.places, stored.conversations, report)


def _stored(
    sources: RowSources,
    encoder: Encoder,
    limits: Limits,
    cache: Path | None,
    num_processes: int | None,
) -> StoredRows:
    def write(folder: Path) -> None:
        report = DataReport()
        stream = conversations(sources, report)
        write_rows(folder, stream, ChunkEncoder(encoder, limits), report, num_processes)

    if cache is None or sources.rows is not None or not _is_writable(cache / "data"):
        return _unkept(write)
    folder = cache / "data" / digest_of(_what_decides(sources, encoder, limits))[:32]
    if (stored := open_rows(folder)) is not None:
        logger.info("Encoded rows of an earlier run are used (%s).", folder)
        return stored
    shutil.rmtree(folder, ignore_errors=True)  # whatever is there is damaged
    _remove_old_leftovers(folder.parent)
    try:
        with atomic_folder(folder) as temporary:
            write(temporary)
            stored = open_rows(temporary)  # what is mapped outlives its name
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
        stored = open_rows(Path(name))  # what is mapped outlives its name
    assert stored is not None
    return stored


@cache_results
def _is_writable(folder: Path) -> bool:
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


def _what_decides(sources: RowSources, encoder: Encoder, limits: Limits) -> Iterator[str | bytes]:
    for source in sources.sources:
        settings = {f.name: getattr(source, f.name) for f in fields(source)}
        yield json.dumps(settings, sort_keys=True, default=str)
        yield source_digest(source)
    yield json.dumps(encoder.definition(), sort_keys=True)
    yield encoder.tokenizer.backend_tokenizer.to_str()
    yield json.dumps(encoder.tokenizer.special_tokens_map, sort_keys=True, default=str)
    yield json.dumps([limits.max_length, limits.overlong])
    for path in sorted(Path(__file__).parent.glob("*.py")):
        yield path.read_bytes()
    for name in ("tokenizers", "transformers", "numpy"):
        yield f"{name} {version(name)}"


def _remove_old_leftovers(folder: Path) -> None:
    """Clear away what processes that were killed more than a day ago left behind."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path, ignore_errors=True)
