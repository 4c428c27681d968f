"""Steps that were timed -> the record of a measurement, whatever was trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlora_pl.benching.advice import InUse, advice
from qlora_pl.benching.device_speed import measure_device
from qlora_pl.benching.figures import StepContent, throughput, utilisation
from qlora_pl.benching.prediction import compared, sheet_flops
from qlora_pl.benching.surroundings import describe_surroundings
from qlora_pl.benching.timer import StepTimer
from qlora_pl.modeling.steps.step import StepStatistics

RECORD = "qlora-pl bench"
"""By which a record is told from any other file of JSON."""
FORMAT = 1
"""Of the record; raised when a field changes its meaning."""


def record_of(
    timer: StepTimer, module: Any, what: Mapping[str, Any], tokens_per_micro: int, plan: Any
) -> dict[str, Any]:
    """The record of a run whose steps were timed.

    Args:
        timer: Of the run.
        module: What was trained.
        what: Fields that say what was measured.
        tokens_per_micro: Tokens of a micro-batch, for the rate of products of their shape.
        plan: The ``MemoryPlan``; None: there is none.
    """
    assert timer.clock is not None
    assert timer.cost is not None
    device: torch.device = module.device
    contents = [content_of(step) for step in timer.timed]
    seconds = timer.clock.seconds()
    timing = timer.timing
    dtype = module.base.compute_dtype
    matrix = largest_matrix(module.model, module.plan)
    rates = measure_device(device, dtype, tokens_per_micro, matrix)
    speed = throughput(seconds, contents, timing.repeats)
    compute = utilisation(
        timer.cost,
        seconds,
        contents,
        module.gradient_checkpointing,
        rates["flops_per_second"],
        sheet_flops(device, dtype),
    )
    memory = {
        "of_first_step": timer.clock.peak_of_first,
        "of_timed_steps": timer.clock.peak,
        "before_loading": timer.bytes_before,
        "predicted": compared(plan, timer.clock.peak, timer.bytes_before),
    }
    parts = timer.parts.to_plain() if timer.parts else None
    losses = [step.loss for step in timer.statistics]
    record = {
        "record": RECORD,
        "format": FORMAT,
        **what,
        "timing": vars(timing) | {"follows_protocol": timing.follows_protocol},
        "environment": describe_surroundings(),
        "speed": speed,
        "compute": compute,
        "memory": memory,
        "parts": parts,
        "reading_ratio": timer.reading_seconds / sum(seconds),
        "device_speed": rates,
        "loss": {"first": losses[0], "last": losses[-1], "of_steps": losses},
        "setup_seconds": timer.setup_seconds,
        "first_step_seconds": timer.first_step_seconds,
        "own_overhead_ratio": timer.clock.own_seconds / sum(seconds),
        "out_of_memory_splits": module.runner.num_splits,
    }
    record["advice"] = advice(record, in_use(module))
    return record


def in_use(module: Any) -> InUse:
    """What of a run that was trained is set how; its trainer still has its rows."""
    rows = module.trainer.datamodule
    return InUse(
        kind=module.device.type,
        recomputes=module.gradient_checkpointing,
        num_workers=getattr(rows, "num_workers", 0),
        window=getattr(rows, "window", None),
        is_packed=rows.is_packed,
        optimizer=module.optimizer_config.name,
        dropout=module.lora.dropout,
        dtype=str(module.base.compute_dtype).removeprefix("torch."),
        attention=module.attn_implementation,
    )


def content_of(step: StepStatistics) -> StepContent:
    """What a step was made of."""
    return StepContent(
        step.num_tokens,
        step.num_trained_tokens,
        step.num_padded_tokens,
        step.num_rows,
        step.num_token_pairs,
    )


def largest_matrix(model: nn.Module, plan: Any) -> tuple[int, ...]:
    """Outputs and inputs of the largest matrix that is packed, or of any adapted one."""
    shapes = list(plan.quantized.values()) or [
        tuple(p.shape) for p in model.parameters() if p.ndim == 2
    ]
    largest: tuple[int, ...] = max(shapes, key=math.prod)
    return largest
