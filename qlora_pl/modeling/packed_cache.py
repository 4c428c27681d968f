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
    temporary_folder,
    write_json,
)
from qlora_pl.modeling.identity import BaseIdentity
from qlora_pl.modeling.packed_model import NamedTensors, named_tensors
from qlora_pl.modeling.quantization import BLOCK_SIZE, QuantizationConfig

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Raised when packed weights written by an older version must not be read again."""
ABANDONED_SECONDS = 24 * 3600
"""Age at which an unfinished copy is taken for what a killed process left behind."""
RECORD = "packed.json"
"""Says which files a copy has and which tensors they hold; written last."""
FILE_BYTES = 2**30
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
        # Written whole, or spoilt since: see write_packed.
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


def write_packed(model: nn.Module, folder: Path) -> None:
    """Keep the packed weights for the next start; a cache that cannot be written is no error."""
    from safetensors import SafetensorError

    needed = sum(p.numel() * p.element_size() for p in model.parameters()) * 1.1
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(root)
        if shutil.disk_usage(root).free < needed:
            logger.warning("No room in '%s' to keep the packed weights; going on without.", root)
            return
        temporary = temporary_folder(root)
        held = _write_tensors(model, temporary)
        digests = {p.name: sha256_file(p) for p in sorted(temporary.iterdir())}
        record = {"format": CACHE_FORMAT, "files": digests, "tensors": held}
        write_json(temporary / RECORD, record | {"digest": _digest(record)})
        temporary.rename(folder)
    except (OSError, SafetensorError, TrainingStoppedError) as error:
        if not folder.exists():  # it does if another process was faster, which is as good
            logger.warning("The packed weights were not kept in '%s' (%s).", root, error)
    finally:
        if "temporary" in locals():
            shutil.rmtree(temporary, ignore_errors=True)


def _digest(record: dict[str, Any]) -> str:
    return sha256_bytes(json.dumps(record, sort_keys=True).encode())


def _write_tensors(model: nn.Module, folder: Path) -> dict[str, str]:
    """Write a model's tensors into files of about ``FILE_BYTES``; names -> files."""
    from safetensors.torch import save_file

    held: dict[str, str] = {}
    waiting: dict[str, Tensor] = {}
    num_bytes = num_files = 0

    def write_waiting() -> None:
        nonlocal num_bytes, num_files
        num_files += 1
        file = f"tensors-{num_files:05d}.safetensors"
        save_file(waiting, folder / file)
        held.update(dict.fromkeys(waiting, file))
        waiting.clear()
        num_bytes = 0

    for name, tensor in named_tensors(model):
        waiting[name] = tensor.detach().cpu().contiguous()
        num_bytes += tensor.numel() * tensor.element_size()
        if num_bytes >= FILE_BYTES:
            write_waiting()
    if waiting:
        write_waiting()
    return held


def read_packed(folder: Path) -> NamedTensors:
    """The tensors of a packed copy that has been verified."""
    held: dict[str, str] = json.loads((folder / RECORD).read_text())["tensors"]
    return NamedTensors({name: folder / file for name, file in held.items()})


def _clear_leftovers(root: Path) -> None:
    for path in root.glob(f"{TEMPORARY_PREFIX}*"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
