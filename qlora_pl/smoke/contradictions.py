"""What contradicts itself in a run's settings, which ``fit`` finds when it has started.

The shrunken run has a length and a number of devices of its own, with which it would not show.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from qlora_pl.cli import settings
from qlora_pl.data.batches.global_batch import accumulation_of
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.optimization.optimizers import ScheduleConfig, build_schedule


def refuse_contradictions(run: Any) -> None:
    """Look at what depends on the run's own length and devices.

    Args:
        run: The parsed configuration.

    Raises:
        ConfigurationError: with every problem.
    """
    problems: list[str] = []
    for refuse in (_refuse_uneven_batch, _refuse_endless_schedule):
        try:
            refuse(run)
        except ConfigurationError as error:
            problems += error.problems
    if problems:
        raise ConfigurationError(problems)


def _refuse_uneven_batch(run: Any) -> None:
    """A global batch must be cut evenly over the devices that are named."""
    devices, data = run.trainer.devices, run.data
    num = len(devices) if isinstance(devices, list) else devices
    if isinstance(num, str) and num.isdigit():
        num = int(num)
    if data.global_batch_size is None or not isinstance(num, int) or num < 1:
        return
    size = None if data.tokens_per_batch else data.batch_size
    if size is not None and not isinstance(size, int):
        return
    unit = "packs" if data.packing is True else "rows"
    accumulation_of(data.global_batch_size, size, num * run.trainer.num_nodes, unit)


def _refuse_endless_schedule(run: Any) -> None:
    """A schedule that follows the run's length needs one; a clock (``max_time``) is none."""
    trainer = run.trainer
    if trainer.max_steps in (None, -1) and trainer.max_epochs in (None, -1):
        schedule = ScheduleConfig(**settings(run.model.schedule))
        build_schedule(schedule, torch.optim.SGD([torch.zeros(1)]), math.inf)
