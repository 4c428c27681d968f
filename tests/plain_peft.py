"""Runs the lines that an adapter folder's own README gives, which know nothing of this project."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from cards import blocks
from torch import nn


def reload_with_plain_peft(folder: Path) -> nn.Module:
    """The model that an adapter folder's README loads, on the CPU, kept fit for training."""
    code = blocks(folder, "python")[0].replace('Path(".")', f"Path({str(folder)!r})")
    scope: dict[str, Any] = {}
    try:
        exec(code, scope)
    finally:
        undo_replacements()
    model: nn.Module = scope["model"]
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def undo_replacements() -> None:
    """What a card changed in transformers must not help the tests that follow."""
    from transformers.models.falcon import modeling_falcon

    importlib.reload(modeling_falcon)
