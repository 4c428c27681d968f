"""Files that do something if what is hidden in them is run, and commands that read them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Type = Callable[..., tuple[int, str]]


class Makes:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.folder),)


def fit(base: Path, rows: Path, *more: object) -> list[object]:
    words = ["fit", "--model.model_name_or_path", base, "--data.sources", rows, "--model.lora.r", 4]
    short = ["--data.template", "guanaco", "--data.max_length", 64, "--trainer.accelerator", "cpu"]
    return [*words, *short, "--trainer.max_steps", 1, "--samples.num_prompts", 0, *more]
