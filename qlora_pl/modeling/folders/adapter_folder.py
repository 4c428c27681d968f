"""The adapter folder: the only thing that passes from training to later commands.

A plain PEFT folder, which any PEFT program loads, with a manifest that says what PEFT does not:
which base by content, in which quantisation, under which template, and the SHA-256 of every file.

    adapter_model.safetensors  adapter_config.json       what PEFT reads
    tokenizer.json ...                                   what turns text into its tokens
    manifest.json              run.yaml  README.md       what it is, how it was made, for people
    held_out.safetensors                                 encoded validation rows to score with
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_pl.errors import AdapterFolderError, TrainingStoppedError
from qlora_pl.files import sha256_bytes, sha256_file, write_folder_atomic
from qlora_pl.modeling.folders.model_card import model_card
from qlora_pl.modeling.folders.own_files import lies_in

MANIFEST_FORMAT = 1
WEIGHTS = "adapter_model.safetensors"
HELD_OUT = "held_out.safetensors"
HELD_OUT_ROWS = 64
"""Validation rows that travel with an adapter, so that later commands can say what they changed."""


@dataclass(frozen=True, kw_only=True)
class AdapterManifest:
    """What an adapter belongs to; ``manifest.json``."""

    base: dict[str, Any]
    """``name``, ``revision``, and the fingerprints ``weights`` and ``config``."""
    quantization: dict[str, Any]
    """The quantisation it was trained over, in this project's words."""
    quantization_config: dict[str, Any] | None
    """The same as keyword arguments of transformers' ``BitsAndBytesConfig``, or None."""
    lora: dict[str, Any]
    template: str
    """The name of the template that rendered its training rows."""
    stop_token_ids: list[int]
    max_length: int
    step: int
    """Optimizer steps it was trained for."""
    data: dict[str, Any]
    """``train_rows`` (fingerprint), ``num_train_rows`` and so on."""
    versions: dict[str, str]
    vocabulary_size: int | None = None
    """Rows that the base's embedding is to be resized to first; None: it stays as it is."""
    encoding: dict[str, Any] = field(default_factory=dict)
    """All that made its training rows' ids, the template's text among it; see ``Encoder``."""
    auto_class: str = "AutoModelForCausalLM"
    """The transformers class that loads the base."""
    card: dict[str, Any] = field(default_factory=dict)
    """What README.md says besides: settings, losses, licences, a prompt; see ``card_facts``."""
    format: int = MANIFEST_FORMAT
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every other file of the folder."""


def write_adapter_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    companions: Mapping[str, bytes],
    manifest: AdapterManifest,
    run_yaml: str,
    held_out: Mapping[str, np.ndarray] | None,
) -> None:
    """Write a folder, whole or not at all; touches neither model nor tokenizer.

    Args:
        folder: Must not exist yet.
        tensors: From ``adapter_tensors``.
        companions: From ``companion_files``.
        manifest: What it is; the digests are filled in here.
        run_yaml: The configuration that trained it.
        held_out: Arrays of encoded rows, or None.

    Raises:
        TrainingStoppedError: if it exists already, or a disk is full or not to be written to.
    """
    from safetensors.torch import save

    files: dict[str, bytes | str] = {WEIGHTS: save(dict(tensors), metadata={"format": "pt"})}
    files |= companions
    files["run.yaml"] = run_yaml
    files["README.md"] = model_card(manifest)
    if held_out is not None:
        files[HELD_OUT] = save({name: torch.from_numpy(a) for name, a in held_out.items()})
    digests = {
        name: sha256_bytes(content.encode() if isinstance(content, str) else content)
        for name, content in sorted(files.items())
    }
    files["manifest.json"] = json.dumps(asdict(manifest) | {"files": digests}, indent=2) + "\n"
    write_folder_atomic(folder, files)


def companion_files(model: Any, tokenizer: Any, manifest: AdapterManifest) -> dict[str, bytes]:
    """What PEFT and the tokenizer write by themselves, read back from a temporary folder.

    The same throughout a run.

    Args:
        model: The PEFT model.
        tokenizer: Saved beside it; None: none is.
        manifest: Names the base.

    Raises:
        TrainingStoppedError: if the temporary folder cannot be written to.
    """
    peft_config = copy.copy(model.peft_config["default"])
    peft_config.base_model_name_or_path = manifest.base["name"]  # not the folder of packed weights
    peft_config.revision = manifest.base["revision"]
    peft_config.inference_mode = True
    try:
        with tempfile.TemporaryDirectory() as temporary:
            peft_config.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            # At any depth: further chat templates go into a folder of their own.
            paths = [path for path in sorted(Path(temporary).rglob("*")) if path.is_file()]
            return {str(path.relative_to(temporary)): path.read_bytes() for path in paths}
    except Exception as error:
        if isinstance(error, OSError) or type(error) is Exception:  # the second: tokenizers' own
            raise TrainingStoppedError(
                f"The tokenizer could not be written to '{tempfile.gettempdir()}', through which "
                f"it goes ({error}); free some space there, or set TMPDIR to another folder."
            ) from error
        raise


def read_adapter_folder(folder: Path) -> AdapterManifest:
    """Read a folder's manifest and check every file against it.

    Raises:
        AdapterFolderError: naming the file that is missing or altered.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise AdapterFolderError(
            f"'{folder}' is not an adapter folder of qlora_pl: it has no manifest.json."
        )
    try:
        if not lies_in(folder, path.name):
            raise ValueError("it is a link that leads out of the folder")
        manifest = AdapterManifest(**json.loads(path.read_text()))
        if not isinstance(manifest.base["weights"], str) or not isinstance(manifest.files, dict):
            raise ValueError("a fingerprint or the list of files is of another type")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterFolderError(f"'{path}' cannot be read ({error}).") from error
    if manifest.format != MANIFEST_FORMAT:
        raise AdapterFolderError(
            f"'{path}' has format {manifest.format}, and this version reads {MANIFEST_FORMAT}; use "
            f"the version that wrote it ({manifest.versions.get('qlora-pl', 'unknown')})."
        )
    for name, digest in manifest.files.items():
        if not lies_in(folder, name):
            raise AdapterFolderError(
                f"'{folder}' names the file '{name}', which lies outside of it; a folder of this "
                "project never does, so ask whoever sent it."
            )
        if not (folder / name).is_file():
            raise AdapterFolderError(f"'{folder}' lacks {name}, which its manifest names.")
        if sha256_file(folder / name) != digest:
            raise AdapterFolderError(f"'{folder / name}' was altered since it was written.")
    return manifest


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors as they lie on disk."""
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)
