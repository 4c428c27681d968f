"""What a source's rows are made of, as one number: the key under which they may be kept."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_pl.data.reading.data_files import find_files
from qlora_pl.data.reading.readers import load_hub_dataset
from qlora_pl.data.reading.source_config import SourceConfig
from qlora_pl.errors import ConfigurationError, DatasetFormatError

CHUNK_BYTES = 2**20


def source_digest(source: SourceConfig) -> str:
    """SHA-256 over the bytes that the rows come from, as hexadecimal digits.

    Of files: their bytes in the order in which they are read, and their suffixes, which say how;
    folders and names do not count, so that a copy elsewhere has the same number. Of a dataset of
    the Hub: its name, subset, split and the fingerprint that ``datasets`` gives it, which holds the
    commit. Settings that change what is made of the bytes (format, columns, sample, ...) are not in
    it.

    Raises:
        ConfigurationError: if the source names nothing that can be read.
        DatasetFormatError: if a file or dataset cannot be read.
    """
    if problem := source.problem():
        raise ConfigurationError(problem)
    source = source.resolved()
    digest = sha256()
    if source.is_saved:
        folder = Path(source.path).expanduser()
        _add_text(digest, "saved", source.split)
        files = [path for path in folder.rglob("*") if path.is_file()]
        kept = [path for path in files if not path.name.startswith("cache-")]  # of map and filter
        for path in sorted(kept):
            _add_file(digest, path, str(path.relative_to(folder)))
    elif source.is_local:
        for path in find_files(source.path):
            _add_file(digest, path, "".join(path.suffixes[-2:]).lower())
    else:
        rows = load_hub_dataset(source)
        names = [source.path, source.subset, source.split, source.revision, source.file]
        _add_text(digest, "hub", *(repr(name) for name in names), rows._fingerprint)
    return digest.hexdigest()


def _add_file(digest: Any, path: Path, name: str) -> None:
    try:
        _add_text(digest, name, str(path.stat().st_size))
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DatasetFormatError(
            f"{path}: cannot be read ({error.strerror}); check its permissions."
        ) from error


def _add_text(digest: Any, *parts: str) -> None:
    """With their lengths, so that no two lists of parts look alike."""
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
