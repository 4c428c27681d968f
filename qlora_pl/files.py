"""Files that are whole or absent: written under a temporary name, flushed to disk, then renamed.

A run may be killed at any byte, and a disk may fill up; what was good before must be good after.
Content is serialised to memory first, so that every byte passes through one function of ours.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_pl.errors import TrainingStoppedError

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

TEMPORARY_PREFIX = ".incomplete-"
"""Marks what a killed process left behind; ``remove_leftovers`` clears it away."""


def cache_root(cache_dir: str | None) -> Path:
    """Where this project keeps what can be made again: 4-bit weights, encoded rows.

    ``cache_dir`` if given, else the environment's ``QLORA_PL_CACHE``, else ``~/.cache/qlora_pl``.
    """
    chosen = cache_dir or os.environ.get("QLORA_PL_CACHE") or "~/.cache/qlora_pl"
    return Path(chosen).expanduser()


def sha256_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace a file by this content, or leave it untouched.

    Raises:
        TrainingStoppedError: if the disk is full or the folder cannot be written to.
    """
    # A random name: machines that share a disk may run processes of the same number.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        _write_synced(temporary, data)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise TrainingStoppedError(_why_not_written(path, error)) from error


def append_synced(path: Path, text: str) -> None:
    """Add lines to a file, flushed to disk; a kill may leave the last one cut short.

    Raises:
        TrainingStoppedError: if the disk is full or the file cannot be written to.
    """
    try:
        with path.open("a", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise TrainingStoppedError(_why_not_written(path, error)) from error


def append_row(path: Path, header: str, line: str) -> None:
    """Add a line to a table to which runs side by side may write, and its header if it is new.

    One write under a lock of the kernel's, so that no two lines mix. What a kill has cut short is
    closed off by the next line. A table with another header, of another version, is left as it is:
    then the line goes into one with a number (``table-2.csv``).

    Args:
        path: The table.
        header: Its first line, which ends in a newline, as ``line`` does.
        line: What is added.

    Raises:
        TrainingStoppedError: if the disk is full or the file cannot be written to.
    """
    table, number = path, 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not _append_under(table, header.encode(), line.encode()):
            number += 1
            table = path.with_name(f"{path.stem}-{number}{path.suffix}")
    except OSError as error:
        raise TrainingStoppedError(_why_not_written(table, error)) from error


def _append_under(table: Path, header: bytes, line: bytes) -> bool:
    """Whether the line was added; not below another header."""
    with table.open("ab+") as file:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks: one write is all that is left
                fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        first = file.readline()
        if first not in (b"", header):
            return False
        is_cut = bool(first) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((b"" if first else header) + b"\n" * is_cut + line)
        file.flush()
        os.fsync(file.fileno())
    return True


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, default=str) + "\n")


def share_as_folder(path: Path) -> None:
    """Let those read a file who may read its folder; safetensors makes files for one user alone."""
    with suppress(OSError):  # some file systems have no modes
        path.chmod(path.parent.stat().st_mode & 0o666)


def write_folder_atomic(folder: Path, files: Mapping[str, bytes | str]) -> None:
    """Make a folder with these files, all of them or nothing.

    Raises:
        TrainingStoppedError: if it exists already, or cannot be written.
    """
    with atomic_folder(folder) as temporary:
        for name, content in files.items():
            _write_synced(temporary / name, content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which gets its name when the block ends well.

    Raises:
        TrainingStoppedError: if it exists already, or cannot be written.
    """
    if folder.exists():
        raise TrainingStoppedError(f"'{folder}' exists already and is never overwritten.")
    try:
        temporary = temporary_folder(folder.parent)
    except OSError as error:
        raise TrainingStoppedError(_why_not_written(folder, error)) from error
    try:
        yield temporary
        paths = list(temporary.rglob("*"))
        for path in paths:
            if path.is_file():
                _sync_file(path)
        for parent in [path for path in paths if path.is_dir()] + [temporary]:
            _sync_folder(parent)
        temporary.rename(folder)
        _sync_folder(folder.parent)
    except OSError as error:
        raise TrainingStoppedError(_why_not_written(folder, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(source: Path, destination: Path) -> None:
    """Give a finished folder a second name, in place of what had it; files are shared, not copied.

    Raises:
        TrainingStoppedError: if it cannot be written.
    """
    token = secrets.token_hex(4)
    new, old = (
        destination.with_name(f"{TEMPORARY_PREFIX}{token}-{kind}-{destination.name}")
        for kind in ("new", "old")
    )
    try:
        shutil.copytree(source, new, copy_function=_link)
        for folder in [path for path in new.rglob("*") if path.is_dir()] + [new]:
            _sync_folder(folder)
        if destination.exists():
            destination.rename(old)
        new.rename(destination)
        _sync_folder(destination.parent)
    except OSError as error:
        raise TrainingStoppedError(_why_not_written(destination, error)) from error
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination)
        _sync_file(Path(destination))


def temporary_folder(parent: Path) -> Path:
    """Make a folder for something that is not whole yet, readable by whom the umask says.

    ``tempfile.mkdtemp`` makes one for its owner alone, whose rights would have to be widened later.

    Raises:
        OSError: if it cannot be made.
    """
    folder = parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    return folder


def remove_leftovers(folder: Path) -> None:
    """Clear away what killed processes left behind in a folder."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def serialize(value: Any) -> bytes:
    """What ``torch.save`` would write, which ``torch.load(weights_only=True)`` reads."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _write_synced(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_not_written(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk is full: '{path}' was not written, and what was saved before is untouched; "
            "free some space and resume with --ckpt_path last."
        )
    return f"'{path}' could not be written ({error.strerror}); what was saved before is untouched."
