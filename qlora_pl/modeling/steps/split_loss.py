"""The loss of a whole split: a sum over batches and devices, divided once."""

from __future__ import annotations

import torch
from torch import nn
from torchmetrics import SumMetric

from qlora_pl.modeling.steps.loss import LossSum


class SplitLoss(nn.Module):
    """Adds up nats and trained tokens of the batches that are scored."""

    def __init__(self) -> None:
        super().__init__()
        self.nats, self.tokens = SumMetric(), SumMetric()
        for metric in (self.nats, self.tokens):
            metric.set_dtype(torch.float64)  # a float32 sum of many nats loses the small ones

    def update(self, loss: LossSum) -> None:
        """Add a batch, or a piece of one."""
        self.nats.update(loss.token_sum)
        self.tokens.update(loss.num_tokens)

    def finish(self, split: str) -> dict[str, torch.Tensor]:
        """Loss (nats per trained token) and perplexity over all devices; the next split begins.

        Args:
            split: ``val`` or ``test``, the prefix of the figures' names.
        """
        loss = self.nats.compute() / self.tokens.compute().clamp(min=1)
        self.nats.reset()
        self.tokens.reset()
        return {f"{split}/loss": loss.float(), f"{split}/perplexity": loss.exp().float()}
