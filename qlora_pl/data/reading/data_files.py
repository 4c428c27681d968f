"""Which files a path means: one file, all data files of a folder, or those that a pattern matches.

The kind of a file is its suffix, behind which a compression's may stand (``rows.jsonl.gz``). A
folder that ``datasets`` saved is a source of its own.
"""

from __future__ import annotations

import glob
import re
import zipfile
from pathlib import Path

from qlora_pl.errors import did_you_mean

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
SELF_CONTAINED = (".parquet", ".arrow")
"""Kinds that are read by position, and compress their columns themselves."""

# Files that lie beside data and are none; datasets writes the first ones.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
NOT_DATA_STEMS = {"readme", "license", "licence", "notice", "citation", "changelog", "requirements"}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "validation",
}


class PathError(ValueError):
    """A path that names no data; one clause with what to do."""


def looks_local(text: str) -> bool:
    """Whether a path names files of this machine rather than a dataset of the Hub."""
    suffixes = [suffix.lower() for suffix in Path(text).suffixes[-2:]]
    has_suffix = bool(suffixes) and suffixes[-1] in (*KINDS, *COMPRESSIONS)
    return has_suffix or _is_pattern(text) or "://" in text or Path(text).expanduser().exists()


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, a compression's left away; None: none that is known.

    Raises:
        PathError: if it is a .zip file that does not hold exactly one data file.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if not suffixes or suffixes[-1] not in (*KINDS, *COMPRESSIONS):
        return None
    if suffixes[-1] in KINDS:
        return suffixes[-1]
    if suffixes[-1] == ".zip":
        return kind_of(Path(zip_member(path).filename))
    return suffixes[0] if len(suffixes) == 2 and suffixes[0] in KINDS else None


def zip_member(path: Path) -> zipfile.ZipInfo:
    """The one data file in a .zip file.

    Raises:
        PathError: if there is none, more than one, or no .zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [
                member
                for member in archive.infolist()
                if not member.is_dir() and not member.filename.startswith("__MACOSX/")
            ]
    except Exception as error:  # a damaged directory raises a dozen unrelated types
        raise PathError(
            f"'{path}' is not a .zip file ({error}); make or fetch it again."
        ) from error
    if not members:
        raise PathError(f"'{path}' is an empty .zip file; leave it out, or make it again.")
    if len(members) != 1:
        raise PathError(
            f"'{path}' holds {len(members)} files; unpack it, and name the folder or a file in it."
        )
    if Path(members[0].filename).suffix.lower() not in KINDS:
        raise PathError(f"'{path}' holds '{members[0].filename}', none of {', '.join(KINDS)}.")
    return members[0]


def is_saved_dataset(path: Path) -> bool:
    """Whether ``datasets`` saved a dataset or its splits into this folder."""
    has_state = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return has_state or (path / "dataset_dict.json").is_file()


def find_files(text: str) -> list[Path]:
    """The data files that a path means, sorted by their names.

    Args:
        text: A file, a folder, or a pattern with ``*``, ``?``, ``[...]`` or ``**``.

    Raises:
        PathError: if there are none, or some that cannot be read as data.
    """
    if "://" in text:
        raise PathError(
            f"'{text}' is an address; download it first (curl -LO ADDRESS) and name the file, "
            "since a run must not depend on a page that may change."
        )
    path = Path(text).expanduser()
    if path.is_dir():
        return _files_of_folder(path)
    if not path.exists() and _is_pattern(text):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [file for file in found if file.is_file()]
        if not files:
            raise PathError(f"no file matches '{text}'; check the pattern.")
        return [_readable(file) for file in files]
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PathError(f"no file '{text}'{did_you_mean(path.name, names)}")
    return [_readable(path)]


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _readable(path: Path) -> Path:
    kind = kind_of(path)
    if kind is None:
        raise PathError(
            f"'{path}' is none of {', '.join(KINDS)} (each also with {', '.join(COMPRESSIONS)})."
        )
    if kind in SELF_CONTAINED and path.suffix.lower() in COMPRESSIONS:
        raise PathError(f"'{path}' is compressed twice, by {kind} itself too; unpack it.")
    return path


def _files_of_folder(folder: Path) -> list[Path]:
    files = []
    for path in sorted(folder.iterdir()):
        is_hidden = path.name.startswith((".", "_"))
        is_data = path.name not in NOT_DATA and path.stem.lower() not in NOT_DATA_STEMS
        if path.is_file() and not is_hidden and is_data and kind_of(path) is not None:
            files.append(_readable(path))
    if not files:
        folders = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
        hint = f"name one of its folders ({', '.join(folders[:5])})" if folders else "name another"
        raise PathError(f"'{folder}' holds no data file ({', '.join(KINDS)}); {hint}.")
    _refuse_mixed_splits(folder, files)
    return files


def _refuse_mixed_splits(folder: Path, files: list[Path]) -> None:
    """``train.jsonl`` beside ``test.jsonl``: training on both would go unseen."""
    found: dict[str, Path] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.name.lower())
        for split in {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}:
            found.setdefault(split, file)
    if len(found) > 1:
        names = " and ".join(f"'{file.name}'" for file in list(found.values())[:2])
        raise PathError(
            f"'{folder}' holds the splits {names}; name the files of one, for example "
            f"'{folder / '*train*'}'."
        )
