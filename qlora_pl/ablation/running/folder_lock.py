"""``FolderLock``: one process at a time writes a folder, and others may wait for it.

The kernel's lock goes with whoever holds it, however that process dies. A run's own process
inherits it, so that a grid whose first process was killed finds its orphaned run still locked, and
waits for it in place of training beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
POLL_SECONDS = 0.5


class FolderLock:
    """A context in which the folder is this process's, if ``is_held``.

    Args:
        folder: That exists.
        wait: Asked while another process holds it; once it says True waiting ends without the lock.
            None: no waiting.
    """

    def __init__(self, folder: Path, wait: Callable[[], bool] | None = None) -> None:
        self._path, self._wait = folder / NAME, wait
        self.is_held = False
        self.descriptor = -1

    def __enter__(self) -> FolderLock:
        self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        while not (taken := self._take()) and self._wait is not None and not self._wait():
            time.sleep(POLL_SECONDS)
        self.is_held = taken
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self.descriptor)

    def _take(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
