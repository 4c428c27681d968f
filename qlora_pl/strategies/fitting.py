"""``strategy: auto`` on several GPUs: a whole base on each where it fits, else a shared one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.footprint import estimate_footprint
from qlora_pl.strategies.choice import choose_strategy

logger = logging.getLogger(__name__)


def num_gpus(trainer: Any) -> int:
    """GPUs that a trainer's settings ask for, over all machines; 0 on CPUs.

    Args:
        trainer: The parsed settings.
    """
    if trainer.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return 0
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        on_this_machine = torch.cuda.device_count()
    elif isinstance(devices, str) and not devices.isdigit():
        on_this_machine = len([part for part in devices.split(",") if part.strip()])
    else:
        on_this_machine = len(devices) if isinstance(devices, list) else int(devices)
    return on_this_machine * int(trainer.num_nodes)


def fitting_strategy(
    model: Any, data: Any, num_devices: int, least: Callable[[str, float], float]
) -> str:
    """What fits a run's devices, which is also logged with the figures it is chosen by.

    Args:
        model: A ``QLoRAModule`` that has loaded nothing yet.
        data: An ``InstructionDataModule``.
        num_devices: See ``num_gpus``.
        least: Of a number over all processes, whose machines may have other GPUs; see ``Ranks``.
    """
    skeleton = build_skeleton(
        model.model_name_or_path, model.attn_implementation, model.trust_remote_code
    )
    rows = 1 if data.asked_batch_size == "auto" else data.batch_size
    footprint = estimate_footprint(
        skeleton,
        model.quantization,
        model.lora,
        model.optimizer_config,
        data.tokens_per_batch or rows * data.max_length,
        bool(model.gradient_checkpointing),  # auto: where it has to be
    )
    memory = min(
        torch.cuda.get_device_properties(index).total_memory
        for index in range(torch.cuda.device_count())
    )
    name, reason = choose_strategy(
        footprint.whole, footprint.shared(num_devices), least("gpu_bytes", memory)
    )
    logger.info("%s", reason)
    return name
