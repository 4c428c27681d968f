"""``StepTimer``: times the optimizer steps of a run, then profiles some."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_pl.benching.clock import StepClock, resident_bytes
from qlora_pl.benching.parts import MICRO_BATCH, ROWS, Parts, time_by_part
from qlora_pl.benching.settings import Timing
from qlora_pl.modeling.compute import ComputeCost, compute_cost
from qlora_pl.modeling.steps.step import StepStatistics


class StepTimer(Callback):
    """Keeps what the steps of a run took, and what they were made of.

    Args:
        timing: Which steps.
    """

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.clock: StepClock | None = None
        self.cost: ComputeCost | None = None
        self.statistics: list[StepStatistics] = []
        """Of every step, warm-up included."""
        self.parts: Parts | None = None
        self.bytes_before = 0
        """Of this process, with all libraries and before its base is loaded."""
        self._begun = time.perf_counter()
        self.setup_seconds = 0.0
        """From here to the first step: base, adapters, and whatever a run does before it."""
        self.first_step_seconds = 0.0
        self.reading_seconds = 0.0
        """Of the timed steps, for rows that are read between epochs (``data.window``)."""
        self._last_step = 0
        self._profiler: Any = None
        self._profile_began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read what there is before the base is, libraries that it brings along included."""
        import bitsandbytes  # noqa: F401 (slow to import)
        import peft  # noqa: F401

        self.bytes_before = resident_bytes()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what a step is made of, and begin."""
        module: Any = pl_module
        self.cost = compute_cost(module.model)
        self.clock = StepClock(self.timing, trainer.strategy.root_device)
        self.setup_seconds = time.perf_counter() - self._begun
        self._begun = time.perf_counter()
        self._last_step = trainer.global_step
        self._watch_rows(trainer)
        self.clock.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the end of a step, where this micro-batch was its last."""
        if trainer.global_step == self._last_step:
            return
        assert self.clock is not None
        self._last_step = trainer.global_step
        was_timing = not self.clock.is_done
        number = self.clock.end_step()
        if number == 1:
            self.first_step_seconds = time.perf_counter() - self._begun
        if was_timing:
            module: Any = pl_module
            self.statistics.append(module.last_step)
        if not self.clock.is_done or not self.timing.profiled:
            return
        if was_timing:
            self._begin_profile(trainer, pl_module)
        elif number == self.timing.num_steps:
            self._end_profile(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that ended before its time is profiled no longer."""
        if self._profiler is not None:
            self._end_profile(trainer)
        vars(trainer.datamodule).pop("train_dataloader", None)  # type: ignore[attr-defined]

    @property
    def timed(self) -> list[StepStatistics]:
        """What the timed steps were made of."""
        return self.statistics[self.timing.warmup :]

    def _watch_rows(self, trainer: Any) -> None:
        """Time what a data module reads between epochs, which no loader's operation shows."""
        clock, make = self.clock, trainer.datamodule.train_dataloader
        assert clock is not None

        def watched() -> Any:
            began = time.perf_counter()
            with torch.profiler.record_function(ROWS):
                loader = make()
            if clock.is_timing:
                self.reading_seconds += time.perf_counter() - began
            return loader

        trainer.datamodule.train_dataloader = watched

    # -- the profile -----------------------------------------------------------------------------

    def _begin_profile(self, trainer: Trainer, module: Any) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if trainer.strategy.root_device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        step = module.training_step

        def marked(*arguments: Any) -> Any:
            # The optimizer's step runs this as its closure; without a mark of its own, forward and
            # backward would count as the optimizer's.
            with torch.profiler.record_function(MICRO_BATCH):
                return step(*arguments)

        module.training_step = marked
        self._marked = module
        self._profiler = torch.profiler.profile(activities=activities)
        with _without_words():
            self._profiler.__enter__()
        self._profile_began = time.perf_counter()

    def _end_profile(self, trainer: Trainer) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._profile_began
        with _without_words():
            self._profiler.__exit__(None, None, None)
        del self._marked.training_step  # the class's own again
        is_cuda = trainer.strategy.root_device.type == "cuda"
        self.parts = time_by_part(self._profiler.events(), seconds, self.timing.profiled, is_cuda)
        self._profiler = None


@contextmanager
def _without_words() -> Iterator[None]:
    """Within the block nothing reaches standard error: the profiler's library notes its start."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
