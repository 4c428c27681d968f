"""What the paper says of a run like the one that is planned, to be printed beside the plan.

Dettmers et al. 2023, arXiv:2305.14314: figure 6 (batch 1, length 512, gradient checkpointing), the
introduction and appendix G. The labels of figure 6 are 0.5 to 1.1 GB above the sum of the parts for
7B and 13B; what they contain besides is not said.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape

CLAIM = "more than 65 % less than 16-bit fine-tuning (the paper's summary of its memory use)"
LIKE_TOKENS = 640
"""Of a micro-batch: its scripts' rows have up to 528."""
FULL_65B_GB = 780
"""Of the paper's introduction: full fine-tuning of 65B in 16 bits, 12 bytes a weight."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """The paper's figures for one size of LLaMA."""

    name: str
    """Of the shape in ``known_shapes``."""
    figure6_gb: float
    statement: str = ""
    hours: float | None = None
    cards: tuple[str, ...] = ()
    """Cards of the kind that the hours and the statement are about."""


FIGURES = {
    (4096, 32): Published(name="llama-7b", figure6_gb=6.9),
    (5120, 40): Published(name="llama-13b", figure6_gb=11.3),
    (6656, 60): Published(
        name="llama-33b",
        figure6_gb=24.7,
        statement="needs paging on 24 GB (appendix G), less than 12 hours on one 24 GB consumer "
        "GPU",
        hours=12,
        cards=("RTX3090", "RTX4090"),
    ),
    (8192, 80): Published(
        name="llama-65b",
        figure6_gb=45.0,
        statement="24 hours on one 48 GB professional GPU",
        hours=24,
        cards=("A6000",),
    ),
}
"""By hidden size and layers, with LLaMA's other sizes."""


def published(shape: ModelShape, setting: TrainingSetting) -> Published | None:
    """The paper's figures for a run that is like its own; None: there are none.

    LLaMA of the first generation or of the second where its sizes are the same, 4-bit NormalFloat
    and adapters of rank 64 on every linear module, batch 1 of about 512 tokens.
    """
    found = FIGURES.get((shape.hidden_size, shape.num_layers))
    is_llama = shape.model_type == "llama" and shape.num_heads == shape.num_kv_heads
    is_qlora = setting.quant_type == "nf4" and setting.method == "lora"
    is_like = is_qlora and setting.target_modules == "all-linear" and setting.r == 64
    is_like &= setting.num_tokens <= LIKE_TOKENS and setting.gradient_checkpointing
    is_like &= setting.num_devices == 1
    return found if is_llama and is_like and shape.vocabulary_size <= 32064 else None
