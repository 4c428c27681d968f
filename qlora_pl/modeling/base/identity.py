"""Which base this is: a fingerprint of its content, since a name is only a hint.

Two folders with the same tensors and the same configuration are the same base, however they are
called and sharded; a conversion of the same model is another. Adapters, caches and checkpoints
carry the fingerprint, and everything that joins them to a base compares it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError, TrainingStoppedError
from qlora_pl.files import cache_root, sha256_file, write_json
from qlora_pl.modeling.folders.own_files import is_plain_name

logger = logging.getLogger(__name__)

# Keys of config.json that say who wrote the file rather than what the model computes.
VOLATILE_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
DESCRIBING = ("*.json", "*.model", "*.jinja", "*.txt", "*.py", "README.md")
"""What of a Hub model is no weights."""
FETCHED = (*DESCRIBING, "*.safetensors")
"""What of a Hub model is downloaded; pickled weights only where there are no others. Its README
says under which licence it is."""
WIDEST_FIRST = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types in safetensors' words and in torch's."""
HASH_THREADS = 4
"""hashlib releases the interpreter lock; four threads keep one fast disk busy."""
HASH_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class BaseIdentity:
    """A base model on disk and what it is."""

    name: str
    """As the user wrote it."""
    folder: Path
    """Where its files lie on this machine."""
    weights: str
    """SHA-256 over every tensor's name, type, shape and bytes."""
    config: str
    """SHA-256 over what config.json says about the computation."""

    @property
    def fingerprint(self) -> str:
        """Both in one."""
        return hashlib.sha256(f"{self.weights}{self.config}".encode()).hexdigest()


def identify_base(name: str, revision: str | None, cache_dir: str | None) -> BaseIdentity:
    """Find a base (downloading it if it is a Hub name) and fingerprint it.

    Raises:
        ConfigurationError: if it is not a model folder and not on the Hub.
    """
    folder = locate_base(name, revision, cache_dir)
    files = weight_files(folder)
    known = cache_root(cache_dir) / "fingerprints"
    digests: dict[str, str] = {}
    for path in files:
        digests |= _tensor_digests(path, known)
    weights = hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()
    return BaseIdentity(name, folder, weights, _config_digest(folder / "config.json"))


def locate_base(name: str, revision: str | None, cache_dir: str | None) -> Path:
    """The folder of a base: the one named, or the Hub's snapshot.

    Raises:
        ConfigurationError: naming what is missing.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"model.model_name_or_path: '{name}' is not a model folder; it has no config.json."
            )
        return folder
    if folder.exists():
        raise ConfigurationError(
            f"model.model_name_or_path: '{name}' is a file; name the folder that holds it."
        )
    if not is_hub_name(name):
        raise ConfigurationError(f"model.model_name_or_path: no folder '{name}'.")
    return _snapshot(name, revision, cache_dir)


def is_hub_name(name: str) -> bool:
    """Whether a name that is not a folder here can be one on the Hub (``owner/model``)."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return not is_path and not Path(name).expanduser().exists()


def refuse_unpinned_code(name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Code that is run must be the code that was read, not what its owner puts there tomorrow.

    Raises:
        ConfigurationError: if a Hub model's code may run and no revision is named.
    """
    if trust_remote_code and revision is None and is_hub_name(name):
        raise ConfigurationError(
            f"model.revision: '{name}' may run code of its own (model.trust_remote_code); name the "
            "commit whose code you read."
        )


def refuse_code_from_elsewhere(folder: Path) -> None:
    """Code that may run is the folder's own; another repository's has no revision that was named.

    Raises:
        ConfigurationError: if config.json names code of another repository (``owner/name--``).
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        named = (config.get("auto_map") or {}).values()
    except (OSError, ValueError, AttributeError):
        return  # no configuration that could name any; reading it says what is wrong
    for entry in named:
        for place in entry if isinstance(entry, list) else [entry]:
            if "--" in str(place):
                raise ConfigurationError(
                    f"model.trust_remote_code: '{folder}' takes its code from another repository "
                    f"('{str(place).partition('--')[0]}'), whose newest version would be run; copy "
                    "the code that you read into the folder, and correct auto_map in config.json."
                )


def fetch_without_weights(name: str, revision: str | None, cache_dir: str | None) -> Path:
    """A folder with a Hub model's configuration and tokenizer, and possibly more.

    Raises:
        ConfigurationError: if it cannot be had, saying why.
    """
    return _fetched(name, revision, cache_dir, DESCRIBING)


def _snapshot(name: str, revision: str | None, cache_dir: str | None) -> Path:
    folder = _fetched(name, revision, cache_dir, FETCHED)
    if any(folder.glob("*.safetensors")):
        return folder
    return _fetched(name, revision, cache_dir, (*FETCHED, "pytorch_model*.bin"))


def _fetched(
    name: str, revision: str | None, cache_dir: str | None, patterns: tuple[str, ...]
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=list(patterns),
                ignore_patterns=["consolidated*", "original/*"],  # the same weights once more
            )
        )
    except Exception as error:  # the client raises a dozen unrelated types
        raise ConfigurationError(
            f"model.model_name_or_path: {_why_not_fetched(name, revision, error)}"
        ) from error


def _why_not_fetched(name: str, revision: str | None, error: Exception) -> str:
    """One sentence on a Hub model that could not be had, with what to do."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return (
            f"'{name}' is gated; accept its licence on its page, and set HF_TOKEN in the "
            "environment to a token of that account."
        )
    if "RevisionNotFoundError" in kinds:
        return f"'{name}' has no revision '{revision}'; set model.revision to one of its commits."
    if "RepositoryNotFoundError" in kinds:
        return (
            f"'{name}' is neither a folder here nor a public model; check its spelling, or set "
            "HF_TOKEN in the environment if it is private."
        )
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"}:
        return (
            f"'{name}' is neither a folder here nor in the cache, and the Hub cannot be reached; "
            "go online once, or name a folder."
        )
    return (
        f"'{name}' is neither a folder here nor a model that could be fetched from the Hub "
        f"({type(error).__name__})."
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads a folder's weights from, in order of their names.

    Raises:
        ConfigurationError: if there is none, or one that an index names is missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _indexed(index)
    raise ConfigurationError(
        f"model.model_name_or_path: '{folder}' cannot be loaded: it has no model.safetensors."
    )


def stored_dtype(folder: Path) -> str:
    """The widest floating-point type of a folder's weights, in torch's words; ``auto``: pickled.

    config.json may name a narrower one, to which transformers then rounds what it loads.
    """
    found = set()
    for path in weight_files(folder):
        if path.suffix == ".bin":
            return "auto"
        header, _ = safetensors_header(path)
        found |= {entry.get("dtype") for name, entry in header.items()}
    return next((word for name, word in WIDEST_FIRST.items() if name in found), "auto")


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(map(str, set(json.loads(index.read_text())["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"model.model_name_or_path: '{index}' is no index of weights; fetch it again."
        ) from error
    if outside := [name for name in names if not is_plain_name(name)]:
        raise ConfigurationError(
            f"model.model_name_or_path: '{index}' names '{outside[0]}', which lies outside of its "
            "folder; fetch it again, from a source that you trust."
        )
    files = [index.parent / name for name in names]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ConfigurationError(
            f"model.model_name_or_path: '{index.parent}' lacks {', '.join(missing)}, which its "
            "index names; fetch it again."
        )
    return files


def _config_digest(path: Path) -> str:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigurationError(f"model.model_name_or_path: '{path}' is not JSON.") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"model.model_name_or_path: '{path}' holds no settings.")
    lasting = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    if "auto_map" in lasting:  # the model's code comes with it, and is part of what it computes
        lasting |= {code.name: sha256_file(code) for code in sorted(path.parent.glob("*.py"))}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def _tensor_digests(path: Path, known: Path) -> dict[str, str]:
    """Digest of each tensor; remembered by path, size and modification time of the file."""
    status = path.stat()
    if path.suffix == ".bin":  # pickled: its tensors are not looked at, only its bytes
        return {path.name: file_digest(path, known)}
    signature = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    return _remembered(known, signature, lambda: dict(_hash_tensors(path)))


def _remembered(
    known: Path, signature: str, compute: Callable[[], dict[str, str]]
) -> dict[str, str]:
    """What was computed under this signature before, or now; a memory that fails is no error."""
    memory = known / f"{hashlib.sha256(signature.encode()).hexdigest()[:32]}.json"
    try:
        remembered: dict[str, Any] = json.loads(memory.read_text())
        known_digests: dict[str, str] = remembered["digests"]
        # A bit that rots in a digest leaves a digest: of a base that nobody has.
        if remembered["sha256"] == _digest_of(known_digests):
            return known_digests
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digests = compute()
    try:
        write_json(memory, {"digests": digests, "sha256": _digest_of(digests)})
    except TrainingStoppedError as error:  # a home that is read-only or full
        logger.warning("The fingerprint will be computed again at the next start (%s)", error)
    return digests


def _digest_of(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _hash_tensors(path: Path) -> Iterator[tuple[str, str]]:
    from tqdm.auto import tqdm

    header, offset = safetensors_header(path)
    names = [name for name in header if name != "__metadata__"]

    def digest(name: str) -> str:
        entry = header[name]
        begin, end = entry["data_offsets"]
        content = hashlib.sha256(f"{entry['dtype']}{entry['shape']}".encode())
        # One small piece for all: what is freed by a thread's large reads stays with the process.
        piece = memoryview(bytearray(HASH_PIECE_BYTES))
        with path.open("rb", buffering=0) as file:
            file.seek(offset + begin)
            remaining = end - begin
            while remaining:
                length = file.readinto(piece[:remaining])
                content.update(piece[:length])
                remaining -= length
        return content.hexdigest()

    is_large = path.stat().st_size > 1 << 30
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        bar = tqdm(names, f"Fingerprint of {path.name}", disable=not is_large, unit="tensor")
        yield from zip(names, threads.map(digest, bar), strict=True)


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's table of tensors, and the byte at which their data begin.

    Raises:
        ConfigurationError: if the file is cut short or something else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(length)) if length < size else {}
        except ValueError:
            header = {}
    try:
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max(entry["data_offsets"][1] for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError):  # JSON, but no table of tensors
        end = -1
    if 8 + length + end != size:
        raise ConfigurationError(
            f"model.model_name_or_path: '{path}' is damaged or incomplete; fetch it again."
        )
    return header, 8 + length


def file_digest(path: Path, known: Path) -> str:
    """SHA-256 of a file, remembered like a tensor's."""
    status = path.stat()
    signature = f"file|{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    return _remembered(known, signature, lambda: {"sha256": sha256_file(path)})["sha256"]
