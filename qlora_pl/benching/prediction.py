"""What was said beforehand: memory by the plan, arithmetic by the card's data sheet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from qlora_pl.benching.settings import Workload
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.quantization import resolve_compute_dtype
from qlora_pl.planning.memory.memory_plan import MemoryPlan, plan_memory
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.runs.settings import setting_of
from qlora_pl.planning.shapes.model_shape import (
    is_known_family,
    shape_from_config,
    shape_of_skeleton,
)
from qlora_pl.planning.work.cards import CARDS, Card

LEAST_OF_HOST = 10**9
"""Bytes below which a process's own libraries and buffers, which no plan counts, would be most of
what is measured on a host."""


def plan_of_workload(fields: Mapping[str, Any], workload: Workload, device: torch.device) -> Any:
    """The plan's bytes for a shape; None: it does not know how to plan this.

    Args:
        fields: Of the shape's config.json.
        workload: What is trained.
        device: Where.
    """
    if not is_known_family(fields):
        return None
    setting = TrainingSetting(
        quant_type=workload.quant_type,
        double_quant=workload.double_quant,
        compute_dtype=_name_of(workload.compute_dtype, device),
        r=workload.r,
        adapter_dtype=workload.adapter_dtype,
        dropout=workload.dropout,
        optimizer=workload.optimizer,
        batch_size=workload.lines,
        tokens_per_row=workload.seq,
        has_mask=not workload.packing,
        is_packed=workload.packing,
        attention=workload.attention,
        gradient_checkpointing=workload.checkpointing == "all",
        num_micro_batches=workload.accumulation,
        splits_on_oom=False,
        device="cuda" if device.type == "cuda" else "cpu",
    )
    return plan_memory(shape_from_config(fields), setting)


def plan_of_run(
    run: Any, skeleton: Any, processes: int, tokens_per_row: int, device: torch.device
) -> Any:
    """The plan's bytes for a user's run; None: it does not know how to plan this.

    Args:
        run: Its parsed configuration, completed.
        skeleton: Its base without weights.
        processes: Devices.
        tokens_per_row: Of the longest micro-batch that was trained on.
        device: Where.
    """
    try:
        setting = setting_of(
            run,
            num_devices=processes,
            auto_dtype=_name_of("auto", device),
            device="cuda" if device.type == "cuda" else "cpu",
            tokens_per_row=tokens_per_row,
        )
        return plan_memory(shape_of_skeleton(skeleton), setting)
    except ConfigurationError:
        return None


def compared(plan: MemoryPlan | None, peak: Mapping[str, int], before: int) -> Any:
    """The plan beside what was measured, and how far it was off, of what was measured.

    Args:
        plan: Of the run; None: there is none.
        peak: Of the timed steps, by name.
        before: Bytes that a process on the host had before its base was loaded.
    """
    if plan is None:
        return None
    if "allocated" in peak:
        planned, measured, what, least = plan.allocated, peak["allocated"], "allocated", 0
    else:
        planned, measured = plan.before_overhead, peak["resident"] - before
        least = LEAST_OF_HOST
        what = "resident, above what the process had before it loaded the base"
    return {
        "bytes": planned,
        "measured": measured,
        "what": what,
        "error_ratio": planned / measured - 1 if measured > least else None,
        "components": plan.components,
        "moment": plan.moment,
        "total_with_overhead": plan.total,
    }


def _name_of(compute_dtype: Any, device: torch.device) -> Any:
    return str(resolve_compute_dtype(compute_dtype, device)).removeprefix("torch.")


def sheet_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of 16-bit products that a GPU's maker promises; None: the card is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    card = card_of_device(torch.cuda.get_device_name(device))
    return None if card is None else card.flops


def card_of_device(name: str) -> Card | None:
    """The card that a driver calls so; None: another, or a variant with other rates.

    Drivers write ``NVIDIA A100-SXM4-80GB`` or ``NVIDIA GeForce RTX 4090``. An H100 on a PCIe board,
    or an RTX 3060 Ti, is slower than the card of the table.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    plain = re.sub(r"^(nvidia)?(geforce|tesla|quadro)?", "", plain)
    for card in CARDS:
        own = re.sub(r"[^a-z0-9]", "", card.name.lower().partition("-")[0])
        if re.fullmatch(rf"(rtx)?{own}(sxm\d?|hbm\d?|\d+gb)*", plain):
            return card
    return None
