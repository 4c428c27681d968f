"""The shape that is asked for: a known name, or a folder with a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.planning.shapes.known_shapes import known_shape

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""What families call the number of positions that they have."""


def shape_named(name: str) -> Mapping[str, Any]:
    """The fields of a config.json.

    Raises:
        ConfigurationError: if nothing is called so, with the nearest names.
    """
    folder = Path(name).expanduser()
    path = folder / "config.json" if folder.is_dir() else folder
    if path.is_file():
        return _read(path)
    if folder.is_dir():
        raise ConfigurationError(f"--shape: '{name}' has no config.json; name another folder.")
    try:
        return known_shape(name)
    except ConfigurationError as error:
        raise ConfigurationError(f"--{error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--shape: '{path}' is not JSON; name a config.json.") from error
    if not isinstance(fields, dict) or not fields.get("model_type"):
        raise ConfigurationError(
            f"--shape: '{path}' does not say its model_type, so its family is not known."
        )
    volatile = ("quantization_config", "dtype", "torch_dtype", "_name_or_path", "auto_map")
    return {key: value for key, value in fields.items() if key not in volatile}


def refuse_long_rows(config: Any, seq: int, name: str) -> None:
    """Rows must fit into the positions that a model has; beyond them it is not that model.

    Args:
        config: Of transformers.
        seq: Tokens of a row at most.
        name: What the shape is called.

    Raises:
        ConfigurationError: if they do not.
    """
    text = config.get_text_config()
    positions = next((found for key in POSITIONS if (found := getattr(text, key, None))), None)
    if isinstance(positions, int) and seq > positions:
        raise ConfigurationError(
            f"--seq: {seq} tokens are more than the {positions} positions of '{name}'; take at "
            f"most {positions}."
        )
