"""Memory of the host that was freed goes back to the system.

The C library keeps freed blocks of up to 32 MiB for later; a loader that frees thousands of them
between small ones that stay would hold up to three times what the model takes.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names for what ``mallopt`` sets (malloc.h)."""
LARGE_BYTES = 2**18
"""Blocks of at least this size are mapped one by one while a base is loaded."""
MOST_BYTES = 2**25
"""Up to which glibc itself raises that size, on 64 bits (DEFAULT_MMAP_THRESHOLD_MAX)."""


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Within the block, what is freed of the size of tensors goes back to the system at once.

    glibc maps large blocks one by one, but raises what counts as large to the largest that was
    freed, and keeps the others. Afterwards it is what a run ends at anyway, so that a step reuses
    the memory of the step before. Nothing where the C library is not glibc; blocks within each
    other end with the first.
    """
    setting = _of_c_library("mallopt")
    if setting is not None:
        setting(M_MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        if setting is not None:
            setting(M_MMAP_THRESHOLD, MOST_BYTES)
            setting(M_TRIM_THRESHOLD, 2 * MOST_BYTES)  # as glibc raises the two together


def release_freed_memory(of_cycles: bool = False) -> None:
    """Give back what this process has freed; nothing where the C library is not glibc.

    Args:
        of_cycles: Whether to free first what only refers to itself, as a transformers model and its
            quantizer do when nobody else needs them any more; takes a few tenths of a second.
    """
    if of_cycles:
        gc.collect()
    if (trim := _of_c_library("malloc_trim")) is not None:
        trim(0)


@lru_cache
def _of_c_library(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # not a Unix
        return None
