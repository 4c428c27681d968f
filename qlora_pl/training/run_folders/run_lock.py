"""``RunLock``: one process at a time writes a run's folder.

A lock of the kernel's on a file in the folder, because it goes with the process that holds it,
however that process dies; a file that merely existed would outlive a ``kill -9``.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from qlora_pl.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME = ".lock"
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What file systems without locks answer."""

_held: set[int] = set()


class RunLock:
    """Holds the lock of a run's folder from its construction until ``release``.

    Args:
        folder: Of the run.

    Raises:
        ConfigurationError: if another process holds it, or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigurationError(
                f"'{folder}' cannot be written to ({error.strerror}); choose another run.root."
            ) from error
        _held.add(self._descriptor)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no file locks")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._descriptor, 1000).decode(errors="replace") or "another process"
            self.release()
            raise ConfigurationError(
                f"'{folder}' is being written by {holder}; wait until it ends or stop it, or start "
                "a new run without --ckpt_path."
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                self.release()
                raise
            logger.warning(
                f"'{folder}' lies on a file system without locks; nothing keeps a second process "
                "from writing to it, so start only one."
            )
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Let other processes write; a second call does nothing."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            os.close(self._descriptor)


def _close_in_child() -> None:
    # A loader's process inherits the file and would hold the lock after its parent was killed.
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
