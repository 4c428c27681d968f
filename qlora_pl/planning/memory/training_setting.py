"""``TrainingSetting``: everything of a run that changes what it takes of a device's memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qlora_pl.errors import ConfigurationError

QuantType = Literal["nf4", "fp4", "int8", "none"]
Dtype = Literal["float32", "bfloat16", "float16"]
Strategy = Literal["one", "ddp", "fsdp2", "fsdp2_offload"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

ITEM_SIZES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a value."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetting:
    """One run, in plain values; the defaults are those of a training file."""

    quant_type: QuantType = "nf4"
    """How the base is stored; ``none`` with ``method: lora`` is LoRA over 16 bits."""
    double_quant: bool = True
    """Whether the scales are quantised too (4 bits only)."""
    block_size: int = 64
    """Weights that share a scale (4 bits only)."""
    skip_modules: tuple[str, ...] = ()
    """Modules that are not quantised: full names or their last parts."""
    compute_dtype: Dtype = "bfloat16"
    """Of the matrix products."""
    method: Literal["lora", "dora", "none"] = "lora"
    """What is trained; ``none``: every weight of the base."""
    r: int = 64
    """Rank of the adapters."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of some modules."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Which modules are adapted: as in ``model.lora.target_modules``."""
    adapter_dtype: Dtype = "float32"
    """What trained weights and their gradients are kept in."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which of the base's biases are trained."""
    num_trained_rows: int = 0
    """Rows of the embedding (and of a head of its own) that are trained."""
    optimizer: str = "paged_adamw_32bit"
    """``model.optimizer.name``."""
    has_momentum: bool = False
    """Whether sgd keeps one."""
    batch_size: int = 1
    """Rows of a micro-batch on one device."""
    tokens_per_row: int = 512
    """Of the longest micro-batch, padding included; of an encoder-decoder model, of its source."""
    target_tokens_per_row: int | None = None
    """Of an encoder-decoder model's target; None: as many as of its source."""
    trained_tokens: int | None = None
    """Of a micro-batch; None: all that can be (all but each row's first)."""
    has_mask: bool = True
    """Whether the model is given a mask for padding; packed rows have none."""
    is_packed: bool = False
    """Whether a row holds several documents, told apart by their positions."""
    attention: Attention = "auto"
    """``model.attn_implementation``."""
    gradient_checkpointing: bool = True
    """Whether a layer's activations are computed again in the backward pass."""
    num_micro_batches: int = 1
    """Of a step on one device: from the second on, gradients are made apart from those before."""
    splits_on_oom: bool = True
    """Whether ``model.on_oom`` is ``split``, which is why they are made apart."""
    strategy: Strategy = "one"
    """Whether devices hold the whole base (``one``, ``ddp``) or share it."""
    num_devices: int = 1
    """Devices of the run."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Whose kernels run; they keep different things for the backward pass."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: must be at least 1, got {value}."
            for name, value in (
                ("batch_size", self.batch_size),
                ("tokens_per_row", self.tokens_per_row),
                ("r", self.r),
                ("num_devices", self.num_devices),
                ("num_micro_batches", self.num_micro_batches),
                ("block_size", self.block_size),
            )
            if value < 1
        ]
        if self.method == "none" and self.quant_type != "none":
            problems.append(
                f"quant_type: {self.quant_type} weights have no gradient, so method: none needs "
                "quant_type: none."
            )
        if problems:
            raise ConfigurationError(problems)

    @property
    def is_four_bits(self) -> bool:
        """Whether the base is stored in four bits."""
        return self.quant_type in ("nf4", "fp4")

    @property
    def is_quantized(self) -> bool:
        """Whether the base is stored in eight or four bits."""
        return self.quant_type != "none"

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, not the base itself."""
        return self.method != "none"

    @property
    def rest_dtype(self) -> str:
        """What weights that are not quantised are kept in, as the loader chooses it."""
        if not self.has_adapters:
            return self.adapter_dtype
        is_wide = self.compute_dtype == "float16" and self.is_quantized
        return "float32" if is_wide else self.compute_dtype

    @property
    def uses_autocast(self) -> bool:
        """Whether products cast their inputs: in float16, and over float32 weights all trained."""
        is_mixed = not self.has_adapters and self.compute_dtype != self.adapter_dtype
        return self.compute_dtype == "float16" or is_mixed

    @property
    def is_shared(self) -> bool:
        """Whether devices hold parts of the model."""
        return self.strategy.startswith("fsdp2")

    @property
    def num_shards(self) -> int:
        """Parts that each tensor is cut into."""
        return self.num_devices if self.is_shared else 1

    @property
    def num_tokens(self) -> int:
        """Of a micro-batch, padding included; of the source where there are two sides."""
        return self.batch_size * self.tokens_per_row

    @property
    def num_trained_tokens(self) -> int:
        """Tokens of a micro-batch whose logits are made, at most those that there are."""
        most = self.batch_size * (self.tokens_per_row - 1)
        return most if self.trained_tokens is None else min(most, self.trained_tokens)
