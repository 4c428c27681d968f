"""Packed weights on disk: quantised once, read bit for bit at every later start.

Reading takes a fortieth of the time of quantising. A copy is used only if its name says the same
base, quantisation and kind of device, and every file of it is what was written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import (
    TEMPORARY_PREFIX,
    cache_root,
    sha256_bytes,
    sha256_file,
    share_as_folder,
    temporary_folder,
    write_json,
)
from qlora_pl.modeling.base.identity import BaseIdentity
from qlora_pl.modeling.base.quantization import BLOCK_SIZE, QuantizationConfig
from qlora_pl.modeling.loading.packed_model import (
    NamedTensors,
    named_tensors,
    packed_tensors,
    without_bytes,
)

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Raised when packed weights written by an older version must not be read again."""
ABANDONED_SECONDS = 24 * 3600
"""Age at which an unfinished copy is taken for what a killed process left behind."""
RECORD = "packed.json"
"""Says which files a copy has and which tensors they hold; written last."""
FILE_BYTES = 2**26
"""Size at which a copy's file is full; so much is collected in host memory at a time."""


def packed_folder(
    identity: BaseIdentity,
    config: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: str | None,
) -> Path:
    """Where the packed copy of a base under a quantisation lies; its name says all it depends on.

    The kind of device is part of it: bitsandbytes rounds the 8-bit constants on a grid on CPUs (0.2
    % of them come out one code off), and breaks FP4's ties differently.
    """
    skipped = hashlib.sha256(json.dumps(sorted(config.skip_modules)).encode()).hexdigest()[:12]
    parts = [
        identity.fingerprint[:20],
        config.quant_type,
        *(["dq" if config.uses_double_quant else "plain"] if config.is_four_bits else []),
        *([f"b{config.block_size}"] if config.block_size != BLOCK_SIZE else []),
        config.storage_dtype,
        str(dtype).split(".")[-1],
        device.type,
        f"v{CACHE_FORMAT}",
        # a digest, because the names of many modules are longer than a folder's name may be
        *([f"skip-{skipped}"] if config.skip_modules else []),
    ]
    return cache_root(cache_dir) / "packed" / "-".join(parts)


def verify_packed(folder: Path) -> bool:
    """Whether a packed copy is there and every byte of it is what was written.

    It is read in full at every start (35 GB for a 65B: some 20 seconds, and the pages are wanted
    next anyway): a bit that rots leaves a file's size and time as they were.
    """
    record = folder / RECORD
    if not record.is_file():
        # Written whole, or spoilt since: see new_copy.
        shutil.rmtree(folder, ignore_errors=True)
        return False
    try:
        held = json.loads(record.read_text())
        # The record itself must be what was written, or else it counts as a file that is not.
        is_whole = held.pop("digest") == _digest(held)
        files: dict[str, str] = held["files"] if is_whole else {RECORD: "altered"}
    except (ValueError, KeyError, TypeError, AttributeError):
        files = {RECORD: "unreadable"}
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            logger.warning("'%s' was altered since it was written; quantising again.", path)
            shutil.rmtree(folder, ignore_errors=True)
            return False
    return True


class PackedWriter:
    """A packed copy on its way to disk, of which a file's worth waits in host memory at a time.

    Args:
        folder: Where its files go, until they are all there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._waiting: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor, under its name in the model."""
        self._waiting[name] = tensor.detach().cpu().contiguous()
        if sum(t.numel() * t.element_size() for t in self._waiting.values()) >= FILE_BYTES:
            self._write_waiting()

    def put_away(self, name: str, weight: nn.Parameter) -> nn.Parameter:
        """A 4-bit matrix as soon as it is packed; what comes back has its shape and no bytes.

        Raises:
            CopyFailed: if it cannot be written.
        """
        from safetensors import SafetensorError

        try:
            for part, tensor in packed_tensors(name, weight):
                self.add(part, tensor)
        except (OSError, SafetensorError) as error:
            raise CopyFailed(error) from error
        return without_bytes(weight)

    def add_rest(self, model: nn.Module) -> None:
        """Everything of a model but what has been put away."""
        for name, tensor in named_tensors(model):
            if tensor.device.type != "meta":
                self.add(name, tensor)

    def finish(self) -> None:
        """Write what still waits, and the record of all."""
        if self._waiting:
            self._write_waiting()
        record = {"format": CACHE_FORMAT, "files": self._digests, "tensors": self._held}
        write_json(self._folder / RECORD, record | {"digest": _digest(record)})

    def _write_waiting(self) -> None:
        from safetensors.torch import save_file

        file = f"tensors-{len(self._digests) + 1:05d}.safetensors"
        save_file(self._waiting, self._folder / file)
        share_as_folder(self._folder / file)
        self._digests[file] = sha256_file(self._folder / file)
        self._held |= dict.fromkeys(self._waiting, file)
        self._waiting.clear()


class CopyFailed(BaseException):
    """A copy cannot be written on; not an Exception, because transformers would go on without."""


@contextmanager
def new_copy(folder: Path, num_bytes: float) -> Iterator[PackedWriter]:
    """A packed copy to fill, which gets its name when the block ends well, or has one by then.

    Args:
        folder: Its name.
        num_bytes: What it will take.

    Raises:
        OSError: if there is no room for it, or it cannot be written; so does a SafetensorError, or
            a TrainingStoppedError.
    """
    from safetensors import SafetensorError

    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(root)
    if (free := shutil.disk_usage(root).free) < num_bytes * 1.1:
        raise OSError(f"{num_bytes / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} are free")
    temporary = temporary_folder(root)
    try:
        writer = PackedWriter(temporary)
        yield writer
        writer.finish()
        temporary.rename(folder)
    except (OSError, SafetensorError, TrainingStoppedError):
        if not folder.exists():  # it does if another process was faster, which is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_packed(model: nn.Module, folder: Path) -> None:
    """Keep the packed weights for the next start; a cache that cannot be written is no error."""
    from safetensors import SafetensorError

    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        with new_copy(folder, num_bytes) as copy:
            copy.add_rest(model)
    except (OSError, SafetensorError, TrainingStoppedError) as error:
        logger.warning("The packed weights were not kept in '%s' (%s).", folder.parent, error)


def _digest(record: dict[str, Any]) -> str:
    return sha256_bytes(json.dumps(record, sort_keys=True).encode())


def read_packed(folder: Path) -> NamedTensors:
    """The tensors of a packed copy that has been verified."""
    held: dict[str, str] = json.loads((folder / RECORD).read_text())["tensors"]
    return NamedTensors({name: folder / file for name, file in held.items()})


def _clear_leftovers(root: Path) -> None:
    for path in root.glob(f"{TEMPORARY_PREFIX}*"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
