"""Callbacks under which a resumed run is not the uninterrupted one, or no run is like another."""

from __future__ import annotations

import random
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


class ExtraDraw(Callback):
    """Draws one random number at the first micro-batch after a resume."""

    def __init__(self) -> None:
        self.is_due = True

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.is_due and trainer.global_step > 0:
            self.disturb(trainer)
        self.is_due = False

    def disturb(self, trainer: Trainer) -> None:
        random.random()


class OtherMoment(ExtraDraw):
    """Changes Adam's first moment of one tensor, as a save that rounds would."""

    def disturb(self, trainer: Trainer) -> None:
        optimizer = trainer.optimizers[0]
        parameter = next(p for g in optimizer.param_groups for p in g["params"])
        optimizer.state[parameter]["state1"].add_(1.0e-3)


class Noise(Callback):
    """Adds to every gradient what no seed repeats, as nondeterministic kernels do."""

    size = 1.0e-4

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, *_: Any) -> None:
        drawn = torch.Generator().manual_seed(random.SystemRandom().getrandbits(48))
        for parameter in module.parameters():
            if parameter.grad is not None:
                noise = torch.randn(parameter.grad.shape, generator=drawn)
                parameter.grad.mul_(1 + self.size * noise.to(parameter.grad))


class NoiseAndOtherMoment(Noise):
    """Both; the second is far larger than the first."""

    def __init__(self) -> None:
        self.is_due = True

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.is_due and trainer.global_step > 0:
            for state in trainer.optimizers[0].state.values():
                state["state1"].neg_()
        self.is_due = False


class Fails(ExtraDraw):
    """Cannot go on after a resume."""

    def disturb(self, trainer: Trainer) -> None:
        raise RuntimeError("no way back")
