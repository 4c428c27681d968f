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

import torch
from torch import nn

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import (
    TEMPORARY_PREFIX,
    cache_root,
    sha256_file,
    temporary_folder,
    write_json,
)
from qlora_pl.modeling.identity import BaseIdentity
from qlora_pl.modeling.quantization import BLOCK_SIZE, QuantizationConfig

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
"""Raised when packed weights written by an older version must not be read again."""
ABANDONED_SECONDS = 24 * 3600
"""Age at which an unfinished copy is taken for what a killed process left behind."""


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
    record = folder / "packed.json"
    if not record.is_file():
        # Written whole, or spoilt since: see write_packed.
        shutil.rmtree(folder, ignore_errors=True)
        return False
    try:
        files: dict[str, str] = json.loads(record.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        files = {record.name: "unreadable"}
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
        model.save_pretrained(temporary, is_main_process=True)  # type: ignore[operator]
        digests = {p.name: sha256_file(p) for p in sorted(temporary.iterdir())}
        write_json(temporary / "packed.json", {"format": CACHE_FORMAT, "files": digests})
        temporary.rename(folder)
    except (OSError, SafetensorError, TrainingStoppedError) as error:
        if not folder.exists():  # it does if another process was faster, which is as good
            logger.warning("The packed weights were not kept in '%s' (%s).", root, error)
    finally:
        if "temporary" in locals():
            shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(root: Path) -> None:
    for path in root.glob(f"{TEMPORARY_PREFIX}*"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
