"""Bytes of disk that a run needs: the download, the packed copy, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qlora_pl.planning.memory.storage import stored_bytes
from qlora_pl.planning.memory.trained import trained_bytes
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape

DOWNLOAD_ITEM_SIZE = 2
"""Bytes of a weight as models are published, in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class DiskNeed:
    """Bytes on disk when a run is over."""

    download: int
    """The base as it is published; 0: it lies here already."""
    packed_copy: int
    """What the next start loads instead; 0: none is kept."""
    checkpoint: int
    """Of one, to resume from: trained tensors and optimizer state."""
    product: int
    """Of one adapter folder, or model folder, without its small files."""
    num_checkpoints: int

    @property
    def total(self) -> int:
        """With one more of each than is kept: the last one goes when the next is whole."""
        saves = (self.num_checkpoints + 1) * (self.checkpoint + self.product)
        return self.download + self.packed_copy + saves + self.product


def disk_need(
    shape: ModelShape,
    setting: TrainingSetting,
    *,
    is_downloaded: bool = False,
    keeps_packed_copy: bool = True,
    num_checkpoints: int = 3,
) -> DiskNeed:
    """Count the bytes of a run's files.

    Args:
        shape: The base.
        setting: What is trained, and how the base is kept.
        is_downloaded: Whether the base lies here already.
        keeps_packed_copy: ``model.quantization.cache``.
        num_checkpoints: That are kept.
    """
    trained = trained_bytes(shape, replace(setting, strategy="one"))  # files hold them whole
    is_packed = setting.is_quantized and keeps_packed_copy
    return DiskNeed(
        download=0 if is_downloaded else DOWNLOAD_ITEM_SIZE * shape.num_weights,
        packed_copy=stored_bytes(shape.parameters, setting).total if is_packed else 0,
        checkpoint=trained.weights + trained.state + trained.paged_state,
        product=trained.weights,
        num_checkpoints=num_checkpoints,
    )


def num_kept_checkpoints(run: Any, num_steps: int | None) -> int:
    """Checkpoints that are there when a run is over.

    Args:
        run: From ``read_runs``.
        num_steps: Optimizer steps; None: not known.
    """
    kept = int(run.checkpoint.keep_last) + int(run.checkpoint.keep_best)
    every = run.checkpoint.keep_every_n_steps
    return kept + (num_steps // every if every and num_steps else 0)
