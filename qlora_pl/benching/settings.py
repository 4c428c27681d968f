"""What is measured over a known shape, and for how long: the flags of ``qlora-pl bench``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_pl.errors import ConfigurationError

Lengths = Literal["oasst", "alpaca", "chat", "fixed"]
PROTOCOL_WARMUP, PROTOCOL_STEPS = 5, 20
"""Fewer steps give a figure, but none to quote."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long is measured."""

    warmup: int = PROTOCOL_WARMUP
    """Optimizer steps before the clock starts: kernels are chosen and memory is taken in them."""
    steps: int = PROTOCOL_STEPS
    """Optimizer steps that are timed, of each repeat."""
    repeats: int = 1
    """Times that so many steps are timed, one after the other; against another program, processes
    of each, in turn."""
    profiled: int = 3
    """Steps after those, under torch's profiler, for the time by part; 0: none."""

    def __post_init__(self) -> None:
        problems = [
            f"--{name}: must be at least {least}, got {getattr(self, name)}."
            for name, least in (("warmup", 1), ("steps", 1), ("repeats", 1), ("profiled", 0))
            if getattr(self, name) < least
        ]
        if problems:
            raise ConfigurationError(problems)

    @property
    def num_timed(self) -> int:
        """Optimizer steps that are timed in all."""
        return self.steps * self.repeats

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a whole measurement."""
        return self.warmup + self.num_timed + self.profiled

    @property
    def follows_protocol(self) -> bool:
        """Whether there are enough of them for a figure that is quoted."""
        return self.warmup >= PROTOCOL_WARMUP and self.steps >= PROTOCOL_STEPS


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained: a known shape with drawn weights, over drawn rows."""

    shape: str
    """A model's shape by name (llama2-7b, llama3-8b, qwen2.5-7b ...), or a folder with a
    config.json."""
    tokens_per_micro: int = 2048
    """Tokens of a micro-batch, padding included; a multiple of ``seq``."""
    seq: int = 512
    """Tokens that a row may have, and that a line of a micro-batch has."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    lengths: Lengths = "oasst"
    """How long rows are before they are cut at ``seq``: lognormal with the median of a data set
    (alpaca 85, oasst 330, chat 900), or all as long as they may be (fixed)."""
    packing: bool = True
    """Whether rows are packed into lines of ``seq`` tokens; false: a row a line, padded."""
    r: int = 64
    """Rank of the adapters, on all linear layers."""
    dropout: float = 0.0
    """The adapters'."""
    checkpointing: Literal["all", "none"] = "all"
    """Whether activations are recomputed in the backward pass."""
    optimizer: str = "paged_adamw_32bit"
    """As model.optimizer.name."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """As model.attn_implementation."""
    quant_type: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """As model.quantization.quant_type."""
    double_quant: bool = True
    """Whether the scales of 4-bit weights are quantised too."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """As model.quantization.compute_dtype."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """As model.lora.dtype."""
    seed: int = 0
    """Of weights, rows, adapters and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where: a GPU if there is one, or as said."""
    memory_limit: float | None = None
    """GiB of a GPU that may be used, so that a larger one stands for a smaller one."""

    def __post_init__(self) -> None:
        problems = [
            f"--{name.replace('_', '-')}: must be at least {least}, got {getattr(self, name)}."
            for name, least in (
                ("tokens_per_micro", 1),
                ("seq", 8),
                ("accumulation", 1),
                ("r", 1),
                ("seed", 0),
            )
            if getattr(self, name) < least
        ]
        if not problems and self.tokens_per_micro % self.seq:
            lower = self.tokens_per_micro // self.seq * self.seq
            near = f"{lower} or {lower + self.seq}" if lower else f"{self.seq}, or lower --seq"
            problems.append(
                f"--tokens-per-micro: {self.tokens_per_micro} is no multiple of --seq {self.seq}, "
                f"the tokens of a line; take {near}."
            )
        if self.memory_limit is not None and self.memory_limit <= 0:
            problems.append(f"--memory-limit: must be above 0 GiB, got {self.memory_limit}.")
        if problems:
            raise ConfigurationError(problems)

    @property
    def is_four_bits(self) -> bool:
        """Whether the base is packed in 4 bits."""
        return self.quant_type in ("nf4", "fp4")

    @property
    def lines(self) -> int:
        """Lines of a micro-batch."""
        return self.tokens_per_micro // self.seq

    def to_plain(self) -> dict[str, Any]:
        """For a record, and for another process."""
        return asdict(self)
