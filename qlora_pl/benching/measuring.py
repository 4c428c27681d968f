"""One measurement over a known shape, in this process."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from qlora_pl.benching.device import chosen_device
from qlora_pl.benching.figures import loss_problem
from qlora_pl.benching.fitting import refuse_misfit
from qlora_pl.benching.prediction import plan_of_workload
from qlora_pl.benching.record import record_of
from qlora_pl.benching.rows import draw_rows
from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.benching.shapes import shape_named
from qlora_pl.benching.synthetic import SyntheticModule, drawing_seconds, write_config
from qlora_pl.benching.training import settings_of, train_module
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.module import QLoRAModule

logger = logging.getLogger(__name__)

LARGE_SETUP = 1e9
"""Weights above which the time before the first step is told first."""


def measure_shape(workload: Workload, timing: Timing) -> dict[str, Any]:
    """Draw a base, train over drawn rows, and return the record.

    Raises:
        ConfigurationError: for a shape or sizes that cannot be.
        HardwareError: if the device is not there, or the base does not fit into its memory.
    """
    device = chosen_device(workload)
    with tempfile.TemporaryDirectory(prefix="qlora-pl-bench-") as temporary:
        folder = write_config(Path(temporary) / _plain_name(workload), shape_named(workload.shape))
        module = SyntheticModule(folder, workload.shape, workload.seed, **settings_of(workload))
        _tell_setup(refuse_misfit(folder, workload, device), module.quantization, device)
        return measure_module(module, workload, timing)


def measure_module(module: QLoRAModule, workload: Workload, timing: Timing) -> dict[str, Any]:
    """Train a module over a workload's rows, and return the record.

    Args:
        module: Its base is drawn.
        workload: The rows, and how they are trained on.
        timing: Which steps are timed.
    """
    vocabulary = vocabulary_of(module)
    rows = draw_rows(workload, vocabulary, timing.num_steps)
    timer = train_module(module, rows, workload, timing)
    plan = plan_of_workload(shape_named(workload.shape), workload, chosen_device(workload))
    what = {"workload": workload.to_plain()}
    record = record_of(timer, module, what, workload.tokens_per_micro, plan)
    first = timer.statistics[0].loss
    record["loss"] |= {"ln_vocabulary": math.log(vocabulary)}
    record["loss"]["problem"] = loss_problem(first, vocabulary)
    return record


def vocabulary_of(module: QLoRAModule) -> int:
    """Rows of the embedding of a module whose base is not there yet."""
    embedding: Any = build_skeleton(module.identify().folder).get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def _tell_setup(num_weights: int, config: QuantizationConfig, device: torch.device) -> None:
    if num_weights <= LARGE_SETUP:
        return
    seconds = drawing_seconds(num_weights, config, device)
    shown = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    logger.warning(
        "%s weights are drawn and packed first, which takes about %s here.",
        f"{num_weights:,}",
        shown,
    )


def _plain_name(workload: Workload) -> str:
    return Path(workload.shape).name or "shape"
