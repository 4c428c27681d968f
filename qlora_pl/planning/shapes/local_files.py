"""Files of a model that lie on this machine already; nothing is ever fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError


def model_file(name: str, revision: str | None, cache_dir: str | None, file: str) -> Path | None:
    """A file of a model: in its folder, or where an earlier download left it; None: not here.

    Args:
        name: A folder, or a name on the Hub.
        revision: Of the Hub model.
        cache_dir: Where downloads are kept; None: the Hub's default.
        file: Its name in the folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        path = folder / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache  # slow to import
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
    except HFValidationError:  # no name that a Hub model can have
        return None
    return Path(found) if isinstance(found, str) else None


def is_model_here(name: str, revision: str | None, cache_dir: str | None, file: str) -> bool:
    """Whether a file of a model can be read without the network."""
    return model_file(name, revision, cache_dir, file) is not None


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a config.json.

    Raises:
        ConfigurationError: if it is no JSON, or holds no fields.
    """
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"'{path}' cannot be read as JSON; name another model.") from error
    if not isinstance(fields, dict):
        raise ConfigurationError(
            f"'{path}' holds {type(fields).__name__}, no fields of a model; name another one."
        )
    return fields
