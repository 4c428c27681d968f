"""From a training file, parsed and completed, to the plain ``TrainingSetting`` of its run."""

from __future__ import annotations

import math
from typing import Any, Literal

from qlora_pl.planning.training_setting import Dtype, TrainingSetting

PADDED_TO = 8
"""Batches are as wide as a multiple of this."""


def setting_of(
    run: Any,
    *,
    num_devices: int = 1,
    auto_dtype: Dtype = "bfloat16",
    auto_strategy: Literal["one", "ddp", "fsdp2", "fsdp2_offload"] | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    tokens_per_row: int | None = None,
    trained_tokens: int | None = None,
) -> TrainingSetting:
    """What a run's configuration says of memory.

    Args:
        run: From ``cli.read_runs``: the parser's namespace, completed.
        num_devices: Over all machines.
        auto_dtype: What ``compute_dtype: auto`` comes to on the device in question.
        auto_strategy: What ``strategy: auto`` comes to on several devices; None: ddp.
        device: Whose kernels run.
        tokens_per_row: Of the longest micro-batch, where rows have been read; None: what the
            configuration allows.
        trained_tokens: Of that micro-batch; None: all of them.
    """
    model, data, trainer = run.model, run.data, run.trainer
    quantization, lora, optimizer = model.quantization, model.lora, model.optimizer
    compute = quantization.compute_dtype
    length = tokens_per_row or longest_row(data)
    is_packed = data.packing is not False
    rows = data.batch_size
    if data.tokens_per_batch is not None:
        rows = max(1, data.tokens_per_batch // length)
    micro_batches = trainer.accumulate_grad_batches
    if micro_batches is None:
        total = data.global_batch_size
        micro_batches = max(1, -(-total // (rows * num_devices)))
    targets = lora.target_modules
    return TrainingSetting(
        quant_type=quantization.quant_type,
        double_quant=quantization.double_quant is not False,
        block_size=quantization.block_size,
        skip_modules=tuple(quantization.skip_modules),
        compute_dtype=auto_dtype if compute == "auto" else compute,
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
        target_tokens_per_row=data.max_target_length,
        trained_tokens=trained_tokens,
        has_mask=not is_packed and (rows > 1 or data.padding == "max_length"),
        is_packed=is_packed,
        attention=model.attn_implementation,
        gradient_checkpointing=model.gradient_checkpointing,
        num_micro_batches=micro_batches,
        splits_on_oom=model.on_oom == "split",
        strategy=_strategy(trainer.strategy, num_devices, auto_strategy),
        num_devices=num_devices,
        device=device,
    )


def longest_row(data: Any) -> int:
    """Tokens of the longest row that a data section allows, as batches are padded."""
    is_original = data.encoding == "original"
    longest = data.max_length + (data.max_target_length or 0 if is_original else 0)
    return PADDED_TO * math.ceil(longest / PADDED_TO)


def _strategy(
    name: Any, num_devices: int, auto: Literal["one", "ddp", "fsdp2", "fsdp2_offload"] | None
) -> Literal["one", "ddp", "fsdp2", "fsdp2_offload"]:
    if num_devices == 1:
        return "one"
    if name in ("fsdp2", "fsdp2_offload", "ddp"):
        return name  # type: ignore[no-any-return]
    return auto or "ddp"
