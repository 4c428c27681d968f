"""Where a model goes that nobody trains: the first GPU if there is one, else the CPU."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
