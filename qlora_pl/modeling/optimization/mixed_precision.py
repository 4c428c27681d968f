"""Lightning's mixed precision where, and only where, a run's types need it.

Types are set when the base is loaded, and bfloat16 over a frozen base needs nothing more. Products
in float16 need a loss scaler, since small gradients vanish below 6e-8; and float32 weights that are
all trained (``lora.method: none``) are multiplied in 16 bits by autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import Optimizer

from qlora_pl.errors import TrainingStoppedError

INITIAL_SCALE = 16.0
"""Gradients here are of sums over a step's tokens, thousands of times those of a mean, for which
2 ** 16 is usual. The scaler doubles it every ``GROWTH_INTERVAL`` good steps."""
GROWTH_INTERVAL = 200
MAX_SKIPPED = 20
"""Steps in a row whose gradients overflowed before the run is stopped: 16 / 2 ** 20 is hopeless."""


class UnscalingPrecision(MixedPrecision):
    """Mixed precision whose gradients are unscaled, measured and clipped before any step.

    Lightning leaves unscaling to fused optimizers, and can then neither clip nor tell the norm.
    """

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Tell torch's scaler and Lightning that fused optimizers are like the others."""
        for optimizer in optimizers:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return super().connect(model, optimizers, lr_schedulers)


def precision_plugin(
    compute_dtype: torch.dtype, weights: nn.Module, device: torch.device
) -> MixedPrecision | None:
    """The plugin that a run needs besides Lightning's default; None: none.

    Args:
        compute_dtype: Of the matrix products.
        weights: The model; if float32 weights of its layers are trained, they are cast by autocast.
        device: Where it runs.
    """
    if compute_dtype == torch.float16:
        scaler = torch.amp.GradScaler(
            device.type, init_scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL
        )
        return UnscalingPrecision("16-mixed", device.type, scaler)
    embedding = weights.get_input_embeddings().weight  # type: ignore[operator]
    if embedding.dtype != compute_dtype and compute_dtype == torch.bfloat16:
        return UnscalingPrecision("bf16-mixed", device.type)
    return None


def choose_precision(strategy: Any, compute_dtype: torch.dtype, weights: nn.Module) -> None:
    """Give a strategy the plugin that a run needs; see ``precision_plugin``."""
    # The strategy's device: the module is moved there only later.
    plugin = precision_plugin(compute_dtype, weights, strategy.root_device)
    if plugin is not None:
        strategy.precision_plugin = plugin


class SkippedSteps:
    """Counts steps that the loss scaler leaves out because a gradient overflowed."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def count(self, is_skipped: bool, step: int) -> None:
        """Note a step.

        Raises:
            TrainingStoppedError: after ``MAX_SKIPPED`` in a row.
        """
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0
        if self.in_a_row >= MAX_SKIPPED:
            raise TrainingStoppedError(
                f"Step {step}: gradients overflowed float16 in {MAX_SKIPPED} steps in a row, so "
                "nothing is being learnt; set model.quantization.compute_dtype to bfloat16 or "
                "float32, or lower model.optimizer.lr."
            )
