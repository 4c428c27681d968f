"""Asking a model something in the middle of training, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and random states of their own, within the block.

    Every module's mode is put back: setting the root to training would wake dropout that somebody
    had silenced.
    """
    modes = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    if any(modes.values()):
        model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes.items():
            if module.training != mode:  # setting it takes longer than asking
                module.training = mode
