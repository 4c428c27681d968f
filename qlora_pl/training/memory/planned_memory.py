"""What a run that is being started will take of a device's memory, by the plan.

In: the trainer with its module and data. Out: a ``MemoryPlan`` for the micro-batch that is asked
about. ``planning`` does the arithmetic; here is only what of a live run it needs to know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.batches.largest_batch import largest_width
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import resolve_compute_dtype
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.planning.memory.memory_plan import MemoryPlan, TrainingSetting, plan_memory
from qlora_pl.planning.shapes.model_shape import ModelShape, shape_of_skeleton


class RunPlanner:
    """Plans micro-batches of one run.

    Args:
        trainer: Set up as far as its data: rows are read, weights need not be loaded.
        module: Its ``QLoRAModule``.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self._trainer, self._module, self._data = trainer, module, trainer.datamodule
        self.skeleton = skeleton_of(module)
        self.shape: ModelShape = shape_of_skeleton(self.skeleton)

    def largest(self, batch_size: int, recomputes: bool, num_micro_batches: int) -> MemoryPlan:
        """What the largest micro-batch of so many rows takes, whichever rows it is made of.

        Args:
            batch_size: Lines.
            recomputes: Whether activations are recomputed in the backward pass.
            num_micro_batches: Of a step on this device.
        """
        width = largest_width(self._data)
        return self._plan(
            batch_size=batch_size,
            tokens_per_row=width.tokens,
            target_tokens_per_row=width.targets,
            trained_tokens=None if self._is_packed else self._most_trained(batch_size),
            has_mask=not self._is_packed,
            gradient_checkpointing=recomputes,
            num_micro_batches=num_micro_batches,
        )

    def of(self, batch: Any) -> MemoryPlan:
        """What this very micro-batch takes, as the run is set up now."""
        lines, width = batch["input_ids"].shape
        has_targets = "decoder_attention_mask" in batch
        labels = batch["labels"] if has_targets else batch["labels"][:, 1:]
        return self._plan(
            batch_size=lines,
            tokens_per_row=width,
            target_tokens_per_row=batch["labels"].shape[1] if has_targets else None,
            trained_tokens=int((labels != IGNORE_INDEX).sum()),
            has_mask="attention_mask" in batch and not bool(batch["attention_mask"].all()),
            gradient_checkpointing=self._module.gradient_checkpointing,
            num_micro_batches=self._trainer.accumulate_grad_batches,
        )

    @property
    def _is_packed(self) -> bool:
        return self._data.packing is not False

    def _most_trained(self, batch_size: int) -> int:
        counts = self._data.splits["train"].rows.num_trained
        if self._data.window is not None or len(counts) < batch_size:
            return batch_size * largest_width(self._data).tokens
        return int(np.partition(counts, -batch_size)[-batch_size:].sum())

    def _plan(self, **micro_batch: Any) -> MemoryPlan:
        return plan_memory(self.shape, self._setting(**micro_batch))

    def _setting(self, **micro_batch: Any) -> TrainingSetting:
        module, trainer, strategy = self._module, self._trainer, self._trainer.strategy
        quantization, lora, device = module.quantization, module.lora, strategy.root_device
        compute_dtype = resolve_compute_dtype(quantization.compute_dtype, device)
        is_shared = getattr(strategy, "shards_parameters", False)
        shared = "fsdp2_offload" if getattr(strategy, "cpu_offload", False) else "fsdp2"
        return TrainingSetting(
            quant_type=quantization.quant_type,
            double_quant=quantization.uses_double_quant,
            block_size=quantization.block_size,
            skip_modules=tuple(quantization.skip_modules),
            compute_dtype=str(compute_dtype).split(".")[-1],  # type: ignore[arg-type]
            method=lora.method,
            r=lora.r,
            rank_pattern=dict(lora.rank_pattern),
            target_modules=_targets(lora.target_modules),
            adapter_dtype=lora.dtype,
            dropout=lora.dropout,
            bias=lora.bias,
            num_trained_rows=len(lora.trainable_tokens),
            optimizer=module.optimizer_config.name,
            has_momentum=module.optimizer_config.momentum > 0,
            is_packed=self._data.is_packed,
            attention=module.attn_implementation,
            splits_on_oom=module.on_oom == "split" and not is_shared,
            strategy=shared if is_shared else "one" if trainer.world_size == 1 else "ddp",  # type: ignore[arg-type]
            num_devices=trainer.world_size,
            device="cuda" if device.type == "cuda" else "cpu",
            **micro_batch,
        )


def skeleton_of(module: Any) -> nn.Module:
    """The run's model without its weights."""
    identity = module.identity or identify_base(
        module.model_name_or_path, module.revision, module.cache_dir
    )
    return build_skeleton(identity.folder, module.attn_implementation, module.trust_remote_code)


def _targets(chosen: Any) -> str | tuple[str, ...]:
    return chosen if isinstance(chosen, str) else tuple(chosen)
