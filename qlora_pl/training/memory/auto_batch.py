"""``AutoBatch``: settles ``data.batch_size`` and ``model.gradient_checkpointing``: ``auto``.

The plan chooses before weights are loaded; once they are, the choice is tried for real. The rows of
an optimizer step stay what they are, so that the run is the one in which the chosen values had been
written down, byte for byte.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_pl.data.batches.global_batch import (
    AUTO,
    SHARE,
    accumulation_of,
    chosen_accumulation,
)
from qlora_pl.data.batches.largest_batch import largest_width, take_size
from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.modeling.loading.base_loading import prepare_for_training
from qlora_pl.planning.advice.automatic import USABLE, Choice, choices, in_words
from qlora_pl.training.memory.batch_trial import Trial, try_batch
from qlora_pl.training.memory.device_memory import GIB, DeviceMemory, device_memory
from qlora_pl.training.memory.planned_memory import RunPlanner
from qlora_pl.training.run_folders.run_record import RunRecord
from qlora_pl.training.trainer_settings import contradiction

logger = logging.getLogger(__name__)

KEY = "AutoBatch"
SAME_MEMORY = 0.01
"""Difference of two devices' memory, as a share, up to which they count as alike."""


class AutoBatch(Callback):
    """Settles what is auto; where nothing is, it does nothing.

    Under FSDP2, whose ranks cannot fail alone, and on a CPU, where memory ends with a kill, the
    plan alone decides.

    Args:
        memory_gib: See ``RunConfig``.
        resumes_from: The checkpoint that the run goes on from, whose choice stays where it can;
            Lightning tells nobody of it before the model is loaded.
        tries_on_cpu: Whether the choice is tried on a CPU too.
    """

    def __init__(
        self,
        memory_gib: float | None = None,
        resumes_from: Path | None = None,
        tries_on_cpu: bool = False,
    ) -> None:
        self.memory_gib = memory_gib
        self.resumes_from = resumes_from
        self.tries_on_cpu = tries_on_cpu
        self.choices: list[Choice] = []
        """All that come into question, what is wanted most first and what is smallest last."""
        self.number = 0
        """Of the one that is taken, from 0."""
        self._asked: tuple[Any, Any] = (None, None)
        self._reason = ""

    @property
    def state_key(self) -> str:
        """Its name in checkpoints."""
        return KEY

    # -- before weights are loaded -----------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose by the plan; rows are read, and nothing is loaded.

        Raises:
            ConfigurationError: if the global batch cannot be shared out evenly over the devices.
        """
        data, module = cast(Any, trainer).datamodule, cast(Any, pl_module)
        asked = (getattr(data, "asked_batch_size", None), module.gradient_checkpointing)
        if stage != "fit" or AUTO not in asked:
            return
        if asked[0] == AUTO and (accumulation := chosen_accumulation(trainer)) is not None:
            raise ConfigurationError(contradiction(accumulation))
        self._asked, self._trainer, self._module, self._data = asked, trainer, module, data
        processes = getattr(trainer.strategy, "num_processes", 1)
        device = trainer.strategy.root_device
        self.memory = device_memory(device, processes, self.memory_gib)
        self._share = self._share_of_step()
        planner = RunPlanner(trainer, module)
        can_recompute = bool(planner.skeleton.supports_gradient_checkpointing)
        width = largest_width(data).tokens
        size = max(1, data.tokens_per_batch // width) if data.tokens_per_batch else data.batch_size
        self.choices = choices(*asked, self._share, size, width, can_recompute)
        self._take(self._agree(self._planned(planner)))
        module.after_loading = self._settle

    def _share_of_step(self) -> int:
        """Rows of a step on this device."""
        total = self._data.global_batch_size
        if total is None or self._asked[0] != AUTO:
            return SHARE
        return accumulation_of(total, 1, self._trainer.world_size)

    def _planned(self, planner: RunPlanner) -> int:
        """The number of the first choice that fits by the plan, or of the one before a resume."""
        before = recorded(self.resumes_from, self.memory, self._trainer.world_size)
        if before in self.choices:
            self._reason = "as before the checkpoint"
            return self.choices.index(before)
        try:
            needs = self._needs(planner)
        except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError) as error:
            logger.warning("No plan could be made of this model (%s).", error)
            self._reason = "without a plan"
            return 0 if self._tries else len(self.choices) - 1
        usable = USABLE * self.memory.free
        self._reason = (
            f"planned to take {needs[-1] / GIB:.2f} GiB of {usable / GIB:.2f} "
            f"({USABLE:.0%} of what is to be had)"
        )
        if needs[-1] > usable:
            self._reason += "; there is nothing smaller"
        elif len(needs) > 1:
            larger = in_words(self.choices[len(needs) - 2])
            self._reason += f", where {larger} would take {needs[-2] / GIB:.2f}"
        return len(needs) - 1

    def _needs(self, planner: RunPlanner) -> list[float]:
        """Bytes of each choice, up to the first that fits."""
        on_gpu = self._trainer.strategy.root_device.type == "cuda"
        needs: list[float] = []
        for choice in self.choices:
            plan = planner.largest(*choice, self._accumulation(choice))
            needs.append(plan.total if on_gpu else plan.before_overhead)
            if needs[-1] <= USABLE * self.memory.free:
                break
        return needs

    @property
    def _tries(self) -> bool:
        """Whether the choice is tried."""
        strategy = self._trainer.strategy
        is_shared = getattr(strategy, "shards_parameters", False)
        return not is_shared and (strategy.root_device.type != "cpu" or self.tries_on_cpu)

    def _accumulation(self, choice: Choice) -> int:
        if self._asked[0] == AUTO:
            return self._share // choice.batch_size
        return int(self._trainer.accumulate_grad_batches)

    # -- once the model is there -------------------------------------------------------------------

    def _settle(self) -> None:
        """Try the choice and what comes after it until it fits, and write down what is taken.

        Raises:
            HardwareError: on all ranks, if not even a single row fits on one of them.
        """
        first = self.number
        if self._tries:
            number, trial = self._try_from(first)
            number = self._agree(number)
            if number == len(self.choices) and self._asked[0] == AUTO:
                raise HardwareError(
                    "data.batch_size: auto finds none that fits: memory ran out with a single row "
                    f"of {largest_width(self._data).tokens} tokens; lower data.max_length, turn "
                    "model.gradient_checkpointing on, or take a smaller base."
                )
            number = min(number, len(self.choices) - 1)
            if number != first:
                did_not = in_words(self.choices[number - 1])
                self._reason = f"since {did_not} did not fit when it was tried"
            elif trial is not None and trial.peak_bytes is not None:
                self._reason += (
                    f", and found to take {trial.peak_bytes / GIB:.2f} when it was tried"
                )
            self._take(number)
        self._note()

    def _try_from(self, number: int) -> tuple[int, Trial | None]:
        """The first choice from a number on that this device has room for; all in vain: None's."""
        for choice in self.choices[number:]:
            if choice.recomputes and not self._module.gradient_checkpointing:
                self._take(number)
                prepare_for_training(self._module.model, True)
            trial = try_batch(
                self._trainer, self._module, choice.batch_size, self._accumulation(choice)
            )
            if trial.fits and (trial.peak_bytes or 0) <= self.memory.capacity:
                return number, trial
            number += 1
        return number, None

    def _agree(self, number: int) -> int:
        """The smallest choice of all ranks."""
        if self._trainer.world_size == 1:
            return number
        own = torch.tensor(number, device=self._trainer.strategy.root_device)
        torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX)
        return int(own)

    def _take(self, number: int) -> None:
        """Set the run up with a choice, as if it had been written down."""
        self.number, choice = number, self.choices[number]
        self._module.gradient_checkpointing = choice.recomputes
        if self._asked[0] != AUTO:
            return
        take_size(self._data, choice.batch_size)
        self._trainer.accumulate_grad_batches = self._accumulation(choice)

    def _note(self) -> None:
        """Write the values into the run's record, and say in a sentence what was chosen and why."""
        if not self._trainer.is_global_zero:
            return
        choice, values = self.choices[self.number], {}
        if self._asked[0] == AUTO:
            values["data.batch_size"] = choice.batch_size
            if self._data.global_batch_size is None:
                values["trainer.accumulate_grad_batches"] = self._accumulation(choice)
        if self._asked[1] == AUTO:
            values["model.gradient_checkpointing"] = choice.recomputes
        for callback in cast(Any, self._trainer).callbacks:
            if isinstance(callback, RunRecord):
                callback.settle(values)
        said = ", ".join(f"{key}: {str(value).lower()}" for key, value in values.items())
        logger.info("%s (auto), %s.", said, self._reason)

    # -- a checkpoint ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was chosen, for which memory; empty where nothing was auto."""
        if not self.choices:
            return {}
        choice = self.choices[self.number]._asdict()
        capacity, world_size = self.memory.capacity, self._trainer.world_size
        return choice | {"memory_bytes": capacity, "world_size": world_size}


def recorded(checkpoint: Path | None, memory: DeviceMemory, world_size: int) -> Choice | None:
    """What the run of a checkpoint had chosen, if it had as much memory and as many devices.

    Args:
        checkpoint: The file; None: the run begins.
        memory: Of this run.
        world_size: Of this run.
    """
    if checkpoint is None:
        return None
    # Mapped: of a file of gigabytes a page or two are read.
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    states: dict[str, Any] = content.get("callbacks", {})
    before = states.get(KEY)
    if before is None or before["world_size"] != world_size:
        return None
    if abs(before["memory_bytes"] - memory.capacity) > SAME_MEMORY * memory.capacity:
        return None
    return Choice(before["batch_size"], before["recomputes"])
