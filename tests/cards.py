"""The blocks of code of a model card, to be run as they stand."""

from __future__ import annotations

import re
from pathlib import Path


def blocks(folder: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a folder's README, in order."""
    card = (folder / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)
