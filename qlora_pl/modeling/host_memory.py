"""Memory of the host that was freed goes back to the system.

The C library keeps freed blocks of up to 32 MiB for later; a loader that frees thousands of them
between small ones that stay would hold up to twice what the model takes.
"""

from __future__ import annotations

import ctypes
import gc
from functools import lru_cache
from typing import Any


def release_freed_memory(of_cycles: bool = False) -> None:
    """Give back what this process has freed; nothing where the C library is not glibc.

    Args:
        of_cycles: Whether to free first what only refers to itself, as a transformers model and its
            quantizer do when nobody else needs them any more; takes a few tenths of a second.
    """
    if of_cycles:
        gc.collect()
    if (trim := _malloc_trim()) is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # not a Unix
        return None
