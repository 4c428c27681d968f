"""An adapter folder -> its pairs of A and B with their real scale, and whatever else it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_pl.errors import AdapterFolderError, ConfigurationError
from qlora_pl.exporting.plain_adapter import PREFIX, scale_of
from qlora_pl.inspection.places import ModulePlace, in_order, place_modules
from qlora_pl.modeling.folders.adapter_folder import AdapterManifest, read_adapter_folder
from qlora_pl.modeling.folders.peft_folder import (
    locate_adapter,
    other_kind,
    read_config,
    read_tensors,
)
from qlora_pl.modeling.loading.packed_model import name_in_base

A, B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
MAGNITUDE = ".lora_magnitude_vector"
"""DoRA's lengths of rows; PEFT writes it with and without ``.weight``."""


@dataclass(frozen=True)
class Pair:
    """What one module is changed by: scale x B A, and with DoRA other lengths of its rows."""

    module: str
    """In the base."""
    place: ModulePlace
    a: Tensor
    """``(r, in)`` as it lies on disk."""
    b: Tensor
    """``(out, r)``."""
    scale: float
    """alpha / r, or alpha / sqrt(r) with rsLoRA; ranks and alphas of patterns are in it."""
    magnitude: Tensor | None = None
    """``(out,)`` with DoRA."""
    is_embedding: bool = False
    """The base's matrix lies the other way round: ``(in, out)``."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    @property
    def num_wrong(self) -> int:
        """Values that are NaN or infinite."""
        tensors = [self.a, self.b, *([] if self.magnitude is None else [self.magnitude])]
        return sum(int((~tensor.isfinite()).sum()) for tensor in tensors)


@dataclass(frozen=True)
class Adapter:
    """All that an adapter folder trains."""

    name: str
    """As the user wrote it."""
    folder: Path
    config: dict[str, Any]
    """``adapter_config.json``."""
    manifest: AdapterManifest | None
    pairs: dict[str, Pair]
    """By module."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Trained ones, by their name in the base."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """Whole layers and rows of embeddings that were trained, by name."""

    @property
    def base(self) -> str | None:
        """What it was trained over, if a file says so."""
        if self.manifest is not None:
            return str(self.manifest.base["name"])
        return self.config.get("base_model_name_or_path")

    @property
    def weights(self) -> str | None:
        """The fingerprint of the weights it was trained over; None: no file says."""
        return None if self.manifest is None else str(self.manifest.base["weights"])


def read_adapter(name: str, key: str) -> Adapter:
    """Read a folder of this project's or of any PEFT program.

    Args:
        name: A folder, or a name on the Hub.
        key: The flag that names it, for messages.

    Raises:
        ConfigurationError: if it is no LoRA, or adapts what are no matrices.
        AdapterFolderError: if a file was altered, or half of a pair is missing.
    """
    folder = locate_adapter(name, key)
    manifest = read_adapter_folder(folder) if (folder / "manifest.json").is_file() else None
    config = read_config(folder, key)
    if problems := other_kind(folder, config, key):
        raise ConfigurationError(problems)
    if config.get("target_parameters"):
        raise ConfigurationError(
            f"{key}: '{folder}' adapts parameters that are no matrices (target_parameters: "
            f"{config['target_parameters']}), whose A and B hold several experts at once."
        )
    tensors = read_tensors(folder, key)
    pairs = _pairs(tensors, config, folder)
    if not pairs:
        raise ConfigurationError(f"{key}: '{folder}' holds no A and B of any module.")
    rest = {name_in_base(n): t for n, t in tensors.items() if not _is_of_pair(n)}
    biases = {n: t for n, t in rest.items() if n.endswith(".bias")}
    others = {n: t for n, t in rest.items() if n not in biases}
    return Adapter(name, folder, config, manifest, pairs, biases, others)


def _is_of_pair(name: str) -> bool:
    return name.endswith((A, B, EMBEDDING_A, EMBEDDING_B)) or MAGNITUDE in name


def _pairs(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> dict[str, Pair]:
    found: dict[str, tuple[str, Tensor, Tensor, bool]] = {}
    for name, a in tensors.items():
        for first, second in ((A, B), (EMBEDDING_A, EMBEDDING_B)):
            if name.endswith(first):
                full = name.removesuffix(first)
                if full + second not in tensors:
                    raise AdapterFolderError(f"'{folder}' lacks '{full + second}' beside '{name}'.")
                b = tensors[full + second]
                # A convolution's kernel is a matrix of all that it reads.
                found[full] = (full, a.flatten(1), b.flatten(1), first == EMBEDDING_A)
    places = place_modules(name.removeprefix(PREFIX) for name in found)
    pairs = {}
    # Files of weights have their names sorted, layer 10 before layer 2.
    for full, a, b, is_embedding in sorted(found.values(), key=lambda entry: in_order(entry[0])):
        module = full.removeprefix(PREFIX)
        magnitude = tensors.get(f"{full}{MAGNITUDE}.weight", tensors.get(f"{full}{MAGNITUDE}"))
        pairs[module] = Pair(
            module,
            places[module],
            a,
            b,
            scale_of(full, config, a.shape[0]),
            None if magnitude is None else magnitude.flatten(),
            is_embedding,
        )
    return pairs
