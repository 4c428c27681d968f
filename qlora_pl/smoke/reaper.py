"""Waits until a smoke test is no more, however it ended, and then clears up what it has left.

Started as a file of its own, whose standard input is a pipe from the test: that closes even if the
test was killed by SIGKILL. Then every process with the test's folder in its environment is killed,
and the folder removed. Imports nothing that takes time.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "QLORA_PL_CACHE"
"""The variable that holds a path in the folder; every process of a test inherits it."""
GIVEN_UP_SECONDS = 10.0
POLL_SECONDS = 0.02
ATTEMPTS = 5
"""At removing a folder; a process that is about to die may still write into it."""


def main(folder: Path, is_kept: bool) -> None:
    """Wait, and clear up.

    Args:
        folder: The test's.
        is_kept: Whether it stays.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the test's end will do
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    given_up = time.monotonic() + GIVEN_UP_SECONDS
    while (left := processes_of(folder)) and time.monotonic() < given_up:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    for _ in range(0 if is_kept else ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(POLL_SECONDS)


def processes_of(folder: Path) -> list[int]:
    """The processes that were started with this folder in their environment.

    Without ``/proc`` (outside of Linux) none is found; what a test starts ends by itself then.
    """
    mark = f"{MARK}={folder}{os.sep}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            variables = (entry / "environ").read_bytes().split(b"\0")
            if any(variable.startswith(mark) for variable in variables):
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "keep")
