"""A stream of conversations -> encoded chunks in the same order, in one process or in several."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_all_start_methods, get_context

from qlora_pl.data.encoding.encoder import TOKENIZER_CHUNK
from qlora_pl.data.rows.chunks import ChunkEncoder, ChunkResult, Read

CHUNKS_BEFORE_PROCESSES = 16
"""Chunks that are encoded here before processes are started, which takes longer than those do."""
MAX_PROCESSES = 8


def encode_stream(
    stream: Iterable[Read], encode: ChunkEncoder, num_processes: int | None
) -> Iterator[tuple[list[tuple[str, int]], ChunkResult]]:
    """Chunk by chunk, in order, with the files so far and the number of the source of each.

    Args:
        stream: Conversations with their places.
        encode: What to do with a chunk.
        num_processes: 1: all here; None: as many as there are processors, up to 8, once it is
            worth while.
    """
    origins: list[tuple[str, int]] = []
    chunks = _numbered(stream, origins)
    if num_processes is None:
        for chunk, numbers in islice(chunks, CHUNKS_BEFORE_PROCESSES):
            yield origins, encode(chunk, numbers)
    wanted = num_processes or min(num_processors(), MAX_PROCESSES)
    if wanted == 1 or "fork" not in get_all_start_methods():
        for chunk, numbers in chunks:
            yield origins, encode(chunk, numbers)
        return
    with _processes(encode, wanted) as pool:
        waiting: deque[Future[ChunkResult]] = deque()
        for chunk, numbers in chunks:
            waiting.append(pool.submit(_encode_there, chunk, numbers))
            if len(waiting) > 2 * wanted:
                yield origins, waiting.popleft().result()
        while waiting:
            yield origins, waiting.popleft().result()


def num_processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _numbered(
    stream: Iterable[Read], origins: list[tuple[str, int]]
) -> Iterator[tuple[list[Read], list[int]]]:
    known: dict[tuple[str, int], int] = {}
    iterator = iter(stream)
    while chunk := list(islice(iterator, TOKENIZER_CHUNK)):
        numbers = []
        for place, _, source in chunk:
            origin = (place.source, source)
            if origin not in known:
                known[origin] = len(origins)
                origins.append(origin)
            numbers.append(known[origin])
        yield chunk, numbers


_encoder_of_this_process: ChunkEncoder | None = None


@contextmanager
def _processes(encode: ChunkEncoder, number: int) -> Iterator[ProcessPoolExecutor]:
    # Threads of the tokenizer inside processes would fight for the same processors.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with ProcessPoolExecutor(number, get_context("fork"), _start_process, (encode,)) as pool:
            yield pool
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
