"""The files of a base that say what it is, without its weights: from a folder, the Hub, or memory.

They are copied, so that nothing that is done with them reaches the user's own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.identity import (
    fetch_without_weights,
    is_hub_name,
    locate_base,
    safetensors_header,
    weight_files,
)
from qlora_pl.modeling.base.structure import head_name
from qlora_pl.planning.shapes.known_shapes import known_shape, short_name

COPIED = ("*.json", "*.model", "*.jinja", "*.txt", "*.py")
"""What of a base is no weights."""
UNREACHABLE = "the Hub cannot be reached"
"""How the sentence ends that ``identity`` has for a name which could not be asked about."""


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """A base, as far as it can be had without its weights."""

    name: str
    """As the user wrote it."""
    folder: Path
    """A copy of its files."""
    origin: str
    """Where they came from, in words."""
    original: Path | None = None
    """The folder with its weights, if it is on this machine."""
    has_tokenizer: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """What its config.json says.

        Raises:
            ConfigurationError: if that holds no settings.
        """
        try:
            config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
            return {**config}
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"model.model_name_or_path: config.json of '{self.name}' holds no settings in JSON."
            ) from error


def find_base(name: str, revision: str | None, cache_dir: str | None, place: Path) -> BaseFiles:
    """The files of a base that are no weights.

    Args:
        name: A folder, or a name on the Hub.
        revision: Of the latter.
        cache_dir: Of downloads.
        place: The folder to make.

    Raises:
        ConfigurationError: if there is no such base, or the Hub cannot be reached and this project
            does not know its shape.
    """
    if not is_hub_name(name):
        original = locate_base(name, None, None)
        return _copied(name, original, place, "a folder", original)
    try:
        fetched = fetch_without_weights(name, revision, cache_dir)
    except ConfigurationError as error:
        if UNREACHABLE not in str(error):
            raise
        if short_name(name) is None:
            raise ConfigurationError(
                f"{str(error).rstrip('.')}; its shape is not among those that are built in."
            ) from error
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(known_shape(name), indent=2))
        return BaseFiles(name=name, folder=place, origin="the built-in shape", has_tokenizer=False)
    return _copied(name, fetched, place, "the Hub's config.json", None)


def _copied(name: str, source: Path, place: Path, origin: str, original: Path | None) -> BaseFiles:
    if not (source / "config.json").is_file():
        raise ConfigurationError(
            f"model.model_name_or_path: '{name}' is not a model; it has no config.json."
        )
    place.mkdir(parents=True)
    for pattern in COPIED:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, place / path.name)
    names = {path.name for path in place.iterdir()}
    has_tokenizer = bool(names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"})
    return BaseFiles(
        name=name,
        folder=place,
        origin=origin,
        original=original,
        has_tokenizer=has_tokenizer or original is not None,  # which then says what it lacks
    )


def stored_tensors(original: Path) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of what a folder's files hold; None: they are pickled.

    Raises:
        ConfigurationError: if a file is missing, cut short or something else.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(original):
        if path.suffix == ".bin":
            return None
        header, _ = safetensors_header(path)
        found |= {
            name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
        }
    return found


def refuse_missing_head(name: str, skeleton: Any, stored: dict[str, tuple[int, ...]]) -> None:
    """A head that is not tied to the embedding must be among the weights.

    transformers would fill one with random numbers; loading refuses that, hours later.

    Raises:
        ConfigurationError: naming the head.
    """
    head = head_name(skeleton)
    if head is None:
        raise ConfigurationError(
            f"model.model_name_or_path: a {type(skeleton).__name__} has no output head, so it "
            "writes no text; name a model for causal language modelling."
        )
    is_tied = skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight
    last = head.rpartition(".")[2]
    has_head = any(tensor.split(".")[-2:-1] == [last] for tensor in stored)
    if not is_tied and not has_head and not _says_tied(skeleton):
        raise ConfigurationError(
            f"model.model_name_or_path: the files of '{name}' hold no '{head}.weight', the output "
            f"head that its {type(skeleton).__name__} needs, so it would be random; name the "
            "model for causal language modelling, not the body alone."
        )


def _says_tied(skeleton: Any) -> bool:
    # On the meta device parameters are tied by name, not by identity.
    config = skeleton.config.get_text_config()
    return bool(getattr(config, "tie_word_embeddings", False))
