"""A data file as a stream of bytes, unpacked on the way and never whole in memory.

What is not the data that its name promises (a web page, a pointer of Git LFS, another encoding) is
said before a parser trips over it, and a file that unpacks without end is stopped.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from qlora_pl.data.reading.data_files import (
    COMPRESSIONS,
    SELF_CONTAINED,
    PathError,
    kind_of,
    zip_member,
)
from qlora_pl.errors import DatasetFormatError

MAX_EXPANSION = 200
"""Bytes that one compressed byte may become; rows of text become 3 to 50."""
FREE_BYTES = 64 * 2**20
"""Bytes that any file may become, however small it was."""

MAGIC = {
    b"\x1f\x8b": "it is compressed with gzip; end its name in .gz.",
    b"PK\x03\x04": "it is a .zip file (or a spreadsheet); end its name in .zip, or save it as CSV.",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; end its name in .zst.",
    b"BZh91AY&SY": "it is compressed with bzip2; end its name in .bz2.",
    b"\xfd7zXZ": "it is compressed with xz; end its name in .xz.",
    b"PAR1": "it is Parquet; end its name in .parquet.",
    b"ARROW1": "it is Arrow; end its name in .arrow.",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8).",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8).",
}
LFS_POINTER = b"version https://git-lfs"


@contextmanager
def open_data(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """The bytes of a file, unpacked if its suffix says that it is compressed.

    Raises:
        DatasetFormatError: at opening or while reading, if it cannot be read, is damaged, unpacks
            beyond measure, or is visibly something else.
    """
    with ExitStack() as stack:
        try:
            packed = _open_packed(path, stack)
            limit = None
            if path.suffix.lower() in COMPRESSIONS:
                limit = max(FREE_BYTES, MAX_EXPANSION * path.stat().st_size)
        except Exception as error:  # damaged files raise a dozen unrelated types
            raise _cannot_read(path, error) from error
        stream = io.BufferedReader(_Guarded(packed, path, limit), 2**18)
        stack.callback(stream.close)
        refuse_something_else(stream.peek(64)[:64], path)
        yield stream


def _open_packed(path: Path, stack: ExitStack) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return stack.enter_context(gzip.open(path))
    if suffix == ".bz2":
        return stack.enter_context(bz2.open(path))
    if suffix == ".xz":
        return stack.enter_context(lzma.open(path))
    if suffix == ".zst":
        import pyarrow as pa

        return stack.enter_context(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    if suffix == ".zip":
        member = zip_member(path)
        return stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open(member))
    return stack.enter_context(path.open("rb", buffering=0))


class _Guarded(io.RawIOBase):
    """Counts what comes out, and says in one sentence what went wrong below it."""

    def __init__(self, inner: Any, path: Path, limit: int | None) -> None:
        self._inner, self._path, self._limit, self._count = inner, path, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except Exception as error:  # likewise
            raise _cannot_read(self._path, error) from error
        self._count += len(data)
        if self._limit is not None and self._count > self._limit:
            raise DatasetFormatError(
                f"{self._path}: it unpacks to more than {self._limit:,} bytes, {MAX_EXPANSION} "
                "times its size; unpack it yourself if that is meant."
            )
        buffer[: len(data)] = data
        return len(data)


def _cannot_read(path: Path, error: Exception) -> DatasetFormatError:
    if isinstance(error, PathError):
        return DatasetFormatError(f"{path}: {error}")
    if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError):
        return DatasetFormatError(f"{path}: {error.strerror}; check its name and its permissions.")
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    if "encrypted" in reason:
        return DatasetFormatError(f"{path}: it is locked with a password; unpack it first.")
    return DatasetFormatError(
        f"{path}: damaged or cut off ({reason}); fetch or make the file again."
    )


def refuse_something_else(opening: bytes, path: Path) -> None:
    """Refuse what is visibly not of the kind that its name says.

    Args:
        opening: The first bytes of the file.
        path: Its name.

    Raises:
        DatasetFormatError: saying what it is, and what to do.
    """
    if opening.startswith(LFS_POINTER):
        raise DatasetFormatError(
            f"{path}: it is a pointer of Git LFS, not the data; fetch it with 'git lfs pull'."
        )
    kind = kind_of(path)
    for magic, sentence in MAGIC.items():
        could_be_text = kind == ".txt" and magic.isalnum()
        if opening.startswith(magic) and kind not in SELF_CONTAINED and not could_be_text:
            raise DatasetFormatError(f"{path}: {sentence}")
    if kind != ".txt" and opening.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise DatasetFormatError(
            f"{path}: it is a web page, not the data; download the file itself (a link that says "
            "'raw' or 'resolve')."
        )
