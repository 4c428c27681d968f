"""A run as ``plan --shape`` has it: a few flags with the defaults of a training file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.optimization.state_bytes import OptimizerName
from qlora_pl.planning.memory.training_setting import Attention, Dtype, QuantType, TrainingSetting
from qlora_pl.planning.runs.run_keys import RunKeys

MOST = {
    "r": 2**16,
    "batch_size": 2**20,
    "length": 2**24,
    "target_length": 2**24,
    "global_batch_size": 2**30,
    "rows": 2**40,
}
"""Beyond these a number is a slip of the keyboard."""
StrategyName = Literal["auto", "ddp", "fsdp2", "fsdp2_offload"]


@dataclass(frozen=True, kw_only=True)
class AssumedRun:
    """What is trained, and how."""

    quant_type: QuantType = "nf4"
    """How the base is stored."""
    double_quant: bool = True
    """Quantise the scales too (4 bits only)."""
    block_size: int = 64
    """Weights that share a scale (4 bits only)."""
    compute_dtype: Dtype = "bfloat16"
    """Of the matrix products; float16 is a T4's or a V100's."""
    method: Literal["lora", "dora", "none"] = "lora"
    """What is trained: adapters, or with none every weight of the base."""
    r: int = 64
    """Rank of the adapters."""
    target_modules: tuple[str, ...] = ()
    """Last parts of the names of adapted modules; none: all linear ones."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """What trained weights are kept in."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    optimizer: OptimizerName = "paged_adamw_32bit"
    """What steps them."""
    batch_size: int = 1
    """Rows of a micro-batch on one device."""
    length: int = 512
    """Tokens of the longest row; with an encoder, of its source."""
    target_length: int | None = None
    """With an encoder, tokens of the target; none: as many."""
    global_batch_size: int | None = None
    """Rows of an optimizer step over all devices; none: 16, or a micro-batch of each device."""
    gradient_checkpointing: bool = True
    """Compute a layer's activations again in the backward pass."""
    attention: Attention = "auto"
    """The attention kernel."""
    strategy: StrategyName = "auto"
    """How several devices share the work; auto: ddp where it fits, else fsdp2."""
    rows: int | None = None
    """Rows of the whole run, epochs included, for its hours and price."""

    def __post_init__(self) -> None:
        problems = [
            f"--{name.replace('_', '-')}: must lie in 1 to {most:,}, got {value:,}."
            for name, most in MOST.items()
            if (value := getattr(self, name)) is not None and not 1 <= value <= most
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"--dropout: must lie in 0 to 1, without 1, got {self.dropout}.")
        if self.block_size not in (64, 128, 256, 512, 1024, 2048, 4096):
            problems.append(
                f"--block-size: must be a power of 2 from 64 to 4096, got {self.block_size}."
            )
        if self.method == "none" and self.quant_type != "none":
            problems.append(
                f"--method: none trains the base itself, whose {self.quant_type} weights have no "
                "gradient; add --quant-type none."
            )
        if problems:
            raise ConfigurationError(problems)

    def rows_of_step(self, num_devices: int) -> int:
        """Rows of an optimizer step over all devices."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        of_all = self.batch_size * num_devices
        return max(16 // of_all, 1) * of_all

    def setting(self, num_devices: int, accumulation: int) -> TrainingSetting:
        """The run as the arithmetic needs it."""
        return TrainingSetting(
            quant_type=self.quant_type,
            double_quant=self.double_quant and self.quant_type in ("nf4", "fp4"),
            block_size=self.block_size,
            compute_dtype=self.compute_dtype,
            method=self.method,
            r=self.r,
            target_modules=self.target_modules or "all-linear",
            adapter_dtype=self.adapter_dtype,
            dropout=self.dropout,
            optimizer=self.optimizer,
            batch_size=self.batch_size,
            tokens_per_row=self.length,
            target_tokens_per_row=self.target_length,
            has_mask=self.batch_size > 1,
            attention=self.attention,
            gradient_checkpointing=self.gradient_checkpointing,
            num_micro_batches=accumulation,
            num_devices=num_devices,
        )

    def keys(self, accumulation: int) -> RunKeys:
        """What a training file with these values would say."""
        return RunKeys(
            max_length=self.length,
            max_target_length=self.target_length,
            global_batch_size=self.global_batch_size,
            accumulation=accumulation,
        )
