"""Whether a shape can be drawn and trained here, said before any weight is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_pl.benching.device import free_bytes
from qlora_pl.benching.prediction import plan_of_workload
from qlora_pl.benching.settings import Workload
from qlora_pl.benching.shapes import refuse_long_rows, shape_named
from qlora_pl.benching.training import settings_of
from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.modeling.base.quantization import packed_bytes
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization


def refuse_misfit(folder: Path, workload: Workload, device: torch.device) -> int:
    """Refuse what cannot be drawn or trained here, before it is tried; the number of weights.

    Args:
        folder: Holds the shape's config.json.
        workload: What is to be trained.
        device: Where.

    Raises:
        ConfigurationError: if rows are longer than the model can read.
        HardwareError: if the weights and what trains are more than the device's free memory.
    """
    skeleton: Any = build_skeleton(folder, workload.attention)
    if skeleton.config.is_encoder_decoder:
        raise ConfigurationError(
            f"--shape: '{workload.shape}' has an encoder and a decoder, and rows drawn here are of "
            "one text; measure a run of yours with --config."
        )
    refuse_long_rows(skeleton.config, workload.seq, workload.shape)
    weights = _bytes_of_weights(skeleton, workload, device)
    trained = _bytes_of_training(workload, device)
    free = free_bytes(device)
    if workload.memory_limit is not None:
        free = min(free, int(workload.memory_limit * 2**30))
    if weights + trained > free:
        also = "" if weights > free else " or a lower --r"
        raise HardwareError(
            f"--shape: the weights of '{workload.shape}' take {weights / 1e9:.1f} GB, its adapters "
            f"of rank {workload.r} with gradients and optimizer state {trained / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free on this {device.type.upper()}; take a smaller "
            f"shape{also}."
        )
    return sum(p.numel() for p in skeleton.parameters())


def _bytes_of_weights(skeleton: Any, workload: Workload, device: torch.device) -> int:
    config = settings_of(workload)["quantization"]
    plan = plan_quantization(skeleton, config)
    rest = 2 if device.type == "cuda" else 4  # bytes, where the type is not known yet
    num_bytes = 0.0
    for name, parameter in skeleton.named_parameters():
        is_packed = config.is_quantized and name in plan.quantized
        number = parameter.numel()
        num_bytes += packed_bytes(number, config) if is_packed else number * rest
    return int(num_bytes)


def _bytes_of_training(workload: Workload, device: torch.device) -> int:
    """Adapters, gradients and optimizer state; a GPU can move paged state to the host."""
    plan = plan_of_workload(shape_named(workload.shape), workload, device)
    if plan is None:
        return 0
    counted = ["adapters", "gradients", "optimizer_state"]
    if device.type != "cuda":
        counted.append("paged_optimizer_state")
    return sum(max(of_moment[name] for of_moment in plan.moments.values()) for name in counted)
