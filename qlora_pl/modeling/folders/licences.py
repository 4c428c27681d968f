"""Under which licence a base is, as its own README says it; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

UNKNOWN = "unknown"
KEYS = ("license", "license_name", "license_link")
"""What a model's README says of it, in the words of model hubs; ``other`` has a name and a link."""
LONGEST = 200
"""Characters of such a word or address; somebody else wrote them."""


def base_licence(folder: Path) -> dict[str, str]:
    """What a model folder's README says of its licence; nothing where it says nothing.

    Args:
        folder: Of the base.
    """
    from huggingface_hub import metadata_load

    try:
        said = metadata_load(folder / "README.md") or {}
    except Exception:  # no README, or none whose opening can be read
        return {}
    found = {key: said[key] for key in KEYS if _is_word(said.get(key))}
    return found if "license" in found else {}


def in_words(licence: dict[str, str]) -> str:
    """The licence as a cell of a table."""
    if not licence:
        return UNKNOWN
    name = licence.get("license_name")
    shown = licence["license"] if name is None else f"{licence['license']} ({name})"
    return f"{shown}, as its README says"


def _is_word(value: object) -> bool:
    return (
        isinstance(value, str)
        and 0 < len(value) <= LONGEST
        and value.isprintable()
        and "|" not in value
        and "`" not in value
    )
