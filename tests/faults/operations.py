"""Wraps every function through which Python changes files, below one folder.

Each call becomes an operation with a label such as ``write runs/t/version_0/metrics.csv``, in which
what is random in a name is left out: the label and how often it came before name an operation from
one run to the next, whatever the threads' order. ``test_harness`` holds the list against strace's.
"""

from __future__ import annotations

import builtins
import io
import os
import re
from typing import Any

from faults.fault import Injector

RANDOM_NAMES = (
    (re.compile(r"\.incomplete-[a-z0-9_]+"), ".incomplete"),
    (re.compile(r"events\.out\.tfevents\.[^/ ]+"), "events"),
    (re.compile(r"(?<=tmp/)(qlora_pl-)?(tmp)?[a-z0-9_]{8}"), "random"),
    (re.compile(r"data/[a-f0-9]{32}"), "data/rows"),
    (re.compile(r"packed/[^/. ][^/ ]*"), "packed/weights"),
    (re.compile(r"fingerprints/(\.incomplete-)?[a-f0-9]{32}"), r"fingerprints/\1digest"),
    (re.compile(r"/#\d+"), ""),  # a file without a name
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# name in ``os`` -> the operation, and how many leading arguments are paths
ON_PATHS = {
    "rename": ("rename", 2),
    "replace": ("rename", 2),
    "link": ("link", 2),
    "symlink": ("link", 2),
    "unlink": ("unlink", 1),
    "remove": ("unlink", 1),
    "rmdir": ("rmdir", 1),
    "mkdir": ("mkdir", 1),
    "chmod": ("chmod", 1),
    "truncate": ("truncate", 1),
    "utime": ("utime", 1),
}
ON_DESCRIPTORS = {
    "fsync": "fsync",
    "fdatasync": "fsync",
    "ftruncate": "truncate",
    "fchmod": "chmod",
    "sendfile": "copy",
}


def label(operation: str, path: str, workplace: str) -> str | None:
    """The name of an operation on a file; None if the file is not watched."""
    inside = os.path.relpath(path, workplace)
    if inside.startswith(".."):
        return None
    for pattern, plain in RANDOM_NAMES:
        inside = pattern.sub(plain, inside)
    return f"{operation} {inside}"


class Watched(io.FileIO):
    """A file whose every write is an operation."""

    watcher: OperationWatcher
    path: str
    is_cut_short = False

    def write(self, data: Any) -> int:  # type: ignore[override]
        """Write; one that breaks writes half first, as on a disk that fills up."""
        injector = self.watcher.injector
        injector.durable.setdefault(self.path, os.fstat(self.fileno()).st_size)
        if self.is_cut_short:
            self.is_cut_short = False
            injector.break_operation()
        name = label("write", self.path, self.watcher.workplace)
        if name is not None and injector.strikes("write", name):
            some = half(data)
            if not some or injector.is_reached:
                injector.break_operation()
                return super().write(data)  # type: ignore[return-value]
            # The kernel says how much it took; the next call gets the error. A kill comes now.
            written: int = super().write(some)  # type: ignore[assignment]
            injector.reach()
            self.is_cut_short = injector.fails_operations
            return written
        return super().write(data)  # type: ignore[return-value]

    def truncate(self, size: int | None = None) -> int:
        self.watcher.before("truncate", self.path)
        return super().truncate(size)


def half(data: Any) -> memoryview:
    """The first half of some bytes."""
    view = memoryview(data).cast("B")
    return view[: len(view) // 2]


class OperationWatcher:
    """Puts itself between a process and its file system, for good.

    Args:
        injector: Is told of every operation, and breaks one.
    """

    def __init__(self, injector: Injector) -> None:
        self.injector = injector
        self.workplace = str(injector.workplace)
        self._open, self._os_open = io.open, os.open

    def install(self) -> None:
        """Wrap the functions of ``os`` and ``io``."""
        for name, (operation, num_paths) in ON_PATHS.items():
            setattr(os, name, self._on_paths(getattr(os, name), operation, num_paths))
        for name, operation in ON_DESCRIPTORS.items():
            setattr(os, name, self._on_descriptor(getattr(os, name), operation))
        os.write = self._wrapped_write(os.write)
        os.open = self._opened
        io.open = builtins.open = self._opened_file  # type: ignore[assignment]

    def before(self, operation: str, path: str) -> None:
        """An operation is about to happen.

        Raises:
            OSError: if it is the one that breaks with an error.
        """
        name = label(operation, path, self.workplace)
        if name is not None and self.injector.strikes(operation, name):
            self.injector.break_operation()

    # -- the wrappers ----------------------------------------------------------------------------

    def _on_paths(self, function: Any, operation: str, num_paths: int) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            folders = (named.get("src_dir_fd"), named.get("dst_dir_fd"))
            folders = folders if num_paths == 2 else (named.get("dir_fd"),)
            # The arguments after the paths are modes and times.
            paths = [absolute(a, folder) for a, folder in zip(arguments, folders, strict=False)]
            self.before(operation, paths[-1])
            result = function(*arguments, **named)
            if operation == "rename":
                self._follow(*paths)
            return result

        return wrapped

    def _on_descriptor(self, function: Any, operation: str) -> Any:
        def wrapped(descriptor: Any, *arguments: Any, **named: Any) -> Any:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = path_of(number)
            self.before(operation, path)
            result = function(descriptor, *arguments, **named)
            if operation == "fsync":
                self.injector.durable.pop(path, None)
            return result

        return wrapped

    def _follow(self, old: str, new: str) -> None:
        """What is not on disk under its old name is not under its new one, in a folder too."""
        durable = self.injector.durable
        durable.pop(new, None)
        for path in [path for path in durable if path == old or path.startswith(old + "/")]:
            durable[new + path.removeprefix(old)] = durable.pop(path)

    def _wrapped_write(self, function: Any) -> Any:
        def wrapped(descriptor: int, data: Any) -> Any:
            self.before("write", path_of(descriptor))
            return function(descriptor, data)

        return wrapped

    def _opened(self, path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        full = absolute(path, named.get("dir_fd"))
        self.before("open" if flags & WRITING else "read", full)
        return self._os_open(path, flags, *arguments, **named)

    def _opened_file(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """As ``open``, but what is opened for writing goes through ``Watched``."""
        path = path_of(file) if isinstance(file, int) else absolute(file)
        writes = any(letter in mode for letter in "wax+")
        if not isinstance(file, int) and opener is None:  # else os.open opens it
            self.before("open" if writes else "read", path)
        if not writes or label("", path, self.workplace) is None:
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = Watched(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.watcher, raw.path = self, path if opener is None else path_of(raw.fileno())
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE if buffering in (-1, 1) else buffering
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
        buffered = kind(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
        text.mode = mode  # type: ignore[misc]
        return text


def path_of(descriptor: int) -> str:
    """The file behind a descriptor."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
    except OSError:
        return "/nowhere"


def absolute(path: Any, folder: int | None = None) -> str:
    """A path that does not depend on the directory, with the folder's last name resolved away."""
    if isinstance(path, int):
        return path_of(path)
    plain = os.fspath(path)
    plain = plain.decode() if isinstance(plain, bytes) else plain
    if folder is not None:
        plain = os.path.join(path_of(folder), plain)
    return os.path.abspath(plain)
