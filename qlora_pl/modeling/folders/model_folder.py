"""The folder of a base that was trained whole: an ordinary transformers folder with a manifest.

What passes to later commands in place of an adapter folder, and read by every program that reads
models. Its weights are the float32 ones that were trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_pl.errors import TrainingStoppedError
from qlora_pl.files import atomic_folder, sha256_file, write_json
from qlora_pl.modeling.folders.adapter_folder import HELD_OUT, AdapterManifest
from qlora_pl.modeling.folders.model_card import whole_model_card

MAX_SHARD_SIZE = "4GB"


def write_model_folder(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    manifest: AdapterManifest,
    run_yaml: str,
    held_out: Mapping[str, np.ndarray] | None,
) -> dict[str, str]:
    """Write a folder, whole or not at all.

    Args:
        folder: Must not exist yet.
        model: The trained base.
        tokenizer: Saved beside it; None: none is.
        manifest: What it is; the digests are filled in here.
        run_yaml: The configuration that trained it.
        held_out: Arrays of encoded rows, or None.

    Returns:
        The digest of each tensor that was handed over, for comparison with what is read back.

    Raises:
        TrainingStoppedError: if it exists already, or a disk is full or not to be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    digests = tensor_digests(dict(model.named_parameters()))
    try:
        with atomic_folder(folder) as temporary:
            with _cache_in_use(model):
                model.save_pretrained(temporary, max_shard_size=MAX_SHARD_SIZE)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            if held_out is not None:
                rows = {name: torch.from_numpy(array) for name, array in held_out.items()}
                save_file(rows, temporary / HELD_OUT)
            (temporary / "run.yaml").write_text(run_yaml)
            (temporary / "README.md").write_text(whole_model_card(manifest))
            paths = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
            files = {str(path.relative_to(temporary)): sha256_file(path) for path in paths}
            write_json(temporary / "manifest.json", asdict(manifest) | {"files": files})
    except SafetensorError as error:
        raise TrainingStoppedError(
            f"'{folder}' could not be written ({error}); what was saved before is untouched."
        ) from error
    return digests


@contextmanager
def _cache_in_use(model: Any) -> Iterator[None]:
    """Training turns the key-value cache off; who loads the folder to generate wants it on."""
    training = model.config.use_cache
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = training


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's type, shape and bytes."""
    digests = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(f"{flat.dtype}{tuple(flat.shape)}".encode())
        content.update(flat.view(torch.uint8).numpy().data if flat.ndim else flat.numpy().tobytes())
        digests[name] = content.hexdigest()
    return digests


def read_tensor_digests(folder: Path) -> dict[str, str]:
    """The same of the tensors that lie in a folder."""
    from safetensors.torch import load_file

    digests: dict[str, str] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        digests |= tensor_digests(load_file(path))
    return digests
