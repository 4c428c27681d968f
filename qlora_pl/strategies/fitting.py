"""``strategy: auto`` on several GPUs: a whole base on each where it fits, else a shared one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from qlora_pl.modeling.base.quantization import resolve_compute_dtype
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.planning.memory.memory_plan import MemoryPlan, plan_memory
from qlora_pl.planning.memory.training_setting import Strategy
from qlora_pl.planning.runs.settings import setting_of_parts
from qlora_pl.planning.shapes.model_shape import ModelShape, shape_of_skeleton
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
    shape = shape_of_skeleton(
        build_skeleton(model.model_name_or_path, model.attn_implementation, model.trust_remote_code)
    )
    whole, shared = (
        plan_of(shape, model, data, strategy, num_devices).total for strategy in ("ddp", "fsdp2")
    )
    memory = min(
        torch.cuda.get_device_properties(index).total_memory
        for index in range(torch.cuda.device_count())
    )
    name, reason = choose_strategy(whole, shared, least("gpu_bytes", memory))
    logger.info("%s", reason)
    return name


def plan_of(
    shape: ModelShape, model: Any, data: Any, strategy: Strategy, num_devices: int
) -> MemoryPlan:
    """What a run takes of each device under a strategy, at the longest rows that it allows.

    Args:
        shape: The base's.
        model: As in ``fitting_strategy``.
        data: As in ``fitting_strategy``.
        strategy: How devices hold the base.
        num_devices: Over all machines.
    """
    dtype: Any = str(
        resolve_compute_dtype(model.quantization.compute_dtype, torch.device("cuda"))
    ).removeprefix("torch.")
    setting = setting_of_parts(
        model,
        model.optimizer_config,
        data,
        accumulation=None,
        strategy=strategy,
        num_devices=num_devices,
        auto_dtype=dtype,
    )
    return plan_memory(shape, setting)
