"""What a run would take without QLoRA: as LoRA over 16-bit weights, and as full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_pl.planning.memory.memory_plan import plan_memory
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way to train the same model on the same rows."""

    name: str
    before_overhead: int
    """Bytes on each device, without what the allocator adds."""
    reduction: float
    """Share of them that the run as it is does without."""


def as_lora(setting: TrainingSetting) -> TrainingSetting:
    """The same adapters over weights of 16 bits."""
    return replace(setting, quant_type="none", double_quant=False)


def as_full_fine_tuning(setting: TrainingSetting) -> TrainingSetting:
    """Every weight trained in 16 bits by 32-bit AdamW: 12 bytes a weight, as the paper counts."""
    return replace(
        as_lora(setting),
        method="none",
        adapter_dtype="bfloat16",
        splits_on_oom=False,  # gradients of a step are added up in place
        dropout=0.0,
        optimizer="adamw_32bit",
    )


def alternatives(shape: ModelShape, setting: TrainingSetting) -> tuple[Alternative, ...]:
    """Both of them; none for a run that is one of them itself."""
    if not (setting.is_quantized and setting.has_adapters):
        return ()
    ours = plan_memory(shape, setting).before_overhead
    others = {"16-bit LoRA": as_lora, "full fine-tuning": as_full_fine_tuning}
    sizes = {
        name: plan_memory(shape, change(setting)).before_overhead for name, change in others.items()
    }
    return tuple(
        Alternative(name=name, before_overhead=size, reduction=1 - ours / size)
        for name, size in sizes.items()
    )
