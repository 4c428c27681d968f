"""Places in training at which something can happen, and clocks that can be moved.

Public methods of the libraries and of this project are wrapped in the process that is to break, so
that the command it runs is the very command that a user types.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer

from faults.fault import Injector

MOMENTS = {
    "start": "before the first row is read",
    "loading weights": "while the base is loaded",
    "loading rows": "while a batch is collated",
    "forward": "inside a decoder layer of a training step",
    "backward": "inside the backward pass",
    "reduction": "between the last gradient and clipping",
    "optimizer": "between two tensors of an optimizer step",
    "validation": "inside a decoder layer of a validation",
    "step": "when a step has just ended",
    "end": "when training has ended",
}
CLOCKS = ("time", "monotonic", "perf_counter")


class Watcher(Callback):
    """Notes the steps of a run.

    Args:
        injector: Keeps the log.
    """

    def __init__(self, injector: Injector) -> None:
        self.injector = injector

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.injector.note(begins_at=trainer.global_step)
        self._last = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.injector.at_moment("reduction")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != self._last:
            self._last = trainer.global_step
            self.injector.note(step=trainer.global_step)
            self.injector.at_moment("step")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.injector.at_moment("end")


def install(injector: Injector) -> None:
    """Wrap what passes by each of ``MOMENTS``, for good."""
    from bitsandbytes.optim.optimizer import Optimizer2State
    from torch.utils.data import get_worker_info
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from qlora_pl.data.batches.batching import TrainingBatches
    from qlora_pl.data.datamodule import InstructionDataModule
    from qlora_pl.modeling.module import QLoRAModule

    module: Any = None

    def layer(*_: Any) -> None:
        if module is not None and module.training and module.trainer.training:
            injector.at_moment("forward")
        elif module is not None and module.trainer.validating:
            injector.at_moment("validation")

    def remember(self: Any, *_: Any) -> None:
        nonlocal module
        module = self
        injector.at_moment("loading weights")

    def rows(*_: Any) -> None:
        injector.at_moment("loading rows" if get_worker_info() is None else "worker")

    def watch(trainer: Any, *_: Any) -> None:
        trainer.callbacks.append(Watcher(injector))

    _before(InstructionDataModule, "setup", lambda *_: injector.at_moment("start"))
    _before(QLoRAModule, "configure_model", remember)
    _before(TrainingBatches, "__getitem__", rows)
    _before(LlamaDecoderLayer, "forward", layer)
    _before(Optimizer2State, "update_step", lambda *_: injector.at_moment("optimizer"))
    _before(Trainer, "fit", watch)
    _wrap_backward(LlamaDecoderLayer, injector)
    for name in CLOCKS:
        setattr(time, name, _moved(getattr(time, name), injector))


def _before(owner: Any, name: str, call: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        call(*arguments)
        return original(*arguments, **named)

    wrapped.__wrapped__ = original  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _wrap_backward(layer: Any, injector: Injector) -> None:
    original = layer.forward

    def wrapped(*arguments: Any, **named: Any) -> Any:
        output = original(*arguments, **named)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: injector.at_moment("backward"))
        return output

    wrapped.__wrapped__ = original  # type: ignore[attr-defined]
    layer.forward = wrapped


def _moved(clock: Callable[[], float], injector: Injector) -> Callable[[], float]:
    return lambda: clock() + injector.clock_offset
