"""The random states of a process, as tensors that a checkpoint may hold.

Lightning's checkpoints have none, so dropout after a resume would be drawn anew.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def collect_random_states() -> dict[str, Any]:
    """States of Python's, numpy's and torch's global generators, in tensors and primitives."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "cuda_device": torch.cuda.current_device() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what ``collect_random_states`` returned."""
    python = states["python"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    held = states["numpy"]
    keys = held["keys"].numpy().astype(np.uint32)
    np.random.set_state((held["name"], keys, held["position"], held["has_gauss"], held["cached"]))
    torch.set_rng_state(states["torch"].cpu())
    saved, device = states["cuda"], states.get("cuda_device")
    if not torch.cuda.is_available() or not saved:
        return
    if len(saved) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in saved])
    elif device is not None:  # another number of GPUs is visible; the process had and has one
        torch.cuda.set_rng_state(saved[device].cpu())
