"""From a training file, parsed and completed, to the plain ``TrainingSetting`` of its run."""

from __future__ import annotations

import math
from typing import Any, Literal

from qlora_pl.data.batches.global_batch import AUTO, SHARE
from qlora_pl.planning.memory.training_setting import Dtype, Strategy, TrainingSetting

PADDED_TO = 8
"""Batches are as wide as a multiple of this."""


def setting_of(
    run: Any,
    *,
    num_devices: int = 1,
    auto_dtype: Dtype = "bfloat16",
    auto_strategy: Strategy = "ddp",
    device: Literal["cuda", "cpu"] = "cuda",
    tokens_per_row: int | None = None,
    trained_tokens: int | None = None,
) -> TrainingSetting:
    """What a run's configuration says of memory; ``auto`` is the least that it may come to.

    Args:
        run: From ``cli.read_runs``: the parser's namespace, completed.
        num_devices: Over all machines.
        auto_dtype: What ``compute_dtype: auto`` comes to on the device in question.
        auto_strategy: What ``strategy: auto`` comes to on several devices.
        device: Whose kernels run.
        tokens_per_row: Of the longest micro-batch, where rows have been read; None: what the
            configuration allows.
        trained_tokens: Of that micro-batch; None: all of them.
    """
    named = run.trainer.strategy
    strategy = named if named in ("ddp", "fsdp2", "fsdp2_offload") else auto_strategy
    return setting_of_parts(
        run.model,
        run.model.optimizer,
        run.data,
        accumulation=run.trainer.accumulate_grad_batches,
        strategy="one" if num_devices == 1 else strategy,
        num_devices=num_devices,
        auto_dtype=auto_dtype,
        device=device,
        tokens_per_row=tokens_per_row,
        trained_tokens=trained_tokens,
    )


def setting_of_parts(
    model: Any,
    optimizer: Any,
    data: Any,
    *,
    accumulation: int | None,
    strategy: Strategy,
    num_devices: int,
    auto_dtype: Dtype,
    device: Literal["cuda", "cpu"] = "cuda",
    tokens_per_row: int | None = None,
    trained_tokens: int | None = None,
) -> TrainingSetting:
    """The same of a module and a data module, or of the sections that they are made from.

    Args:
        model: A ``QLoRAModule``, or the section ``model``.
        optimizer: Its optimizer's settings.
        data: An ``InstructionDataModule``, or the section ``data``.
        accumulation: Micro-batches of a step on one device; None: ``data.global_batch_size`` says.
        strategy: How devices hold the base.
        num_devices: See ``setting_of``.
        auto_dtype: See ``setting_of``.
        device: See ``setting_of``.
        tokens_per_row: See ``setting_of``.
        trained_tokens: See ``setting_of``.
    """
    quantization, lora = model.quantization, model.lora
    compute, targets = quantization.compute_dtype, lora.target_modules
    length = longest_row(data) if tokens_per_row is None else tokens_per_row
    rows = rows_of_micro_batch(data, length)
    is_packed = data.packing is not False
    return TrainingSetting(
        quant_type=quantization.quant_type,
        double_quant=quantization.double_quant is not False,
        block_size=quantization.block_size,
        skip_modules=tuple(quantization.skip_modules),
        compute_dtype=auto_dtype if compute == AUTO else compute,
        method=lora.method,
        r=lora.r,
        rank_pattern=dict(lora.rank_pattern),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        adapter_dtype=lora.dtype,
        dropout=lora.dropout,
        bias=lora.bias,
        num_trained_rows=len(lora.trainable_tokens),
        optimizer=optimizer.name,
        has_momentum=bool(optimizer.momentum),
        batch_size=rows,
        tokens_per_row=length,
        target_tokens_per_row=None if data.encoding == "original" else data.max_target_length,
        trained_tokens=trained_tokens,
        has_mask=not is_packed and (rows > 1 or data.padding == "max_length"),
        is_packed=is_packed,
        attention=model.attn_implementation,
        gradient_checkpointing=model.gradient_checkpointing is not False,
        num_micro_batches=accumulation or _micro_batches(data, rows, num_devices),
        splits_on_oom=model.on_oom == "split",
        strategy=strategy,
        num_devices=num_devices,
        device=device,
    )


def longest_row(data: Any) -> int:
    """Tokens of the longest row that a data section allows, as batches are padded."""
    is_original = data.encoding == "original"
    longest = data.max_length + (data.max_target_length or 0 if is_original else 0)
    return PADDED_TO * math.ceil(longest / PADDED_TO)


def rows_of_micro_batch(data: Any, length: int) -> int:
    """Rows of a micro-batch of the longest rows."""
    if data.tokens_per_batch is not None:
        return max(1, int(data.tokens_per_batch) // length)
    asked = _asked_batch_size(data)
    return asked if isinstance(asked, int) else 1  # auto: at least one


def _asked_batch_size(data: Any) -> Any:
    # A module that has not settled auto yet begins with another number.
    return getattr(data, "asked_batch_size", data.batch_size)


def _micro_batches(data: Any, rows: int, num_devices: int) -> int:
    total = data.global_batch_size
    if total is None:
        return SHARE if _asked_batch_size(data) == AUTO else 1
    of_one = 1 if data.tokens_per_batch is not None else rows
    return max(1, math.ceil(total / (of_one * num_devices)))
