"""A training file -> a ``PlannedRun``: parsed as ``fit`` parses it, nothing started or fetched."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_pl.cli import read_runs
from qlora_pl.data.batches.global_batch import AUTO, SHARE, accumulation_of
from qlora_pl.errors import ConfigurationError
from qlora_pl.planning.advice.automatic import choices
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.runs.planned_run import AutoCut, PlannedRun, beyond_positions, steps_of
from qlora_pl.planning.runs.run_keys import RunKeys
from qlora_pl.planning.runs.run_rows import RowFacts, UnreadRowsError, read_rows
from qlora_pl.planning.runs.settings import setting_of
from qlora_pl.planning.shapes.known_shapes import known_names, known_shape, short_name
from qlora_pl.planning.shapes.local_files import model_file, read_config
from qlora_pl.planning.shapes.model_shape import (
    ModelShape,
    is_known_family,
    shape_from_config,
    shape_of_skeleton,
)
from qlora_pl.planning.work.disk import num_kept_checkpoints


def planned_file(words: list[str], num_devices: int | None, reads_all: bool) -> PlannedRun:
    """See ``planned_run.configured``."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # importing Lightning sets these to INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    devices = [] if num_devices is None else _device_words(num_devices)
    (run,) = read_runs([[*words, *devices]])
    shape = shape_of_run(run)
    devices_in_all = num_devices or devices_of(run.trainer)
    accumulation = _accumulation(run, devices_in_all)
    setting = setting_of(run, num_devices=devices_in_all)
    setting = replace(setting, num_micro_batches=accumulation)
    rows, note = _rows_of(run, reads_all)
    if rows is not None:
        setting = with_rows(setting, rows)
    auto = _auto_of(run, setting, rows, accumulation)
    if auto is not None:
        setting = auto.applied(setting, auto.choices[-1])
    micro_batches = _micro_batches_of_epoch(run, rows, devices_in_all)
    steps = steps_of(run, micro_batches, accumulation)
    name = str(run.model.model_name_or_path)
    return PlannedRun(
        name=str(run.run.name),
        base=name,
        shape=shape,
        setting=setting,
        keys=_keys(run, accumulation, rows),
        chooses_dtype=run.model.quantization.compute_dtype == "auto",
        chooses_strategy=run.trainer.strategy == "auto",
        num_micro_batches=None if steps is None else steps * accumulation,
        num_steps=steps,
        rows=rows,
        auto=auto,
        notes=(note, *beyond_positions(shape, setting.tokens_per_row)),
        is_downloaded=Path(name).expanduser().is_dir(),
        keeps_packed_copy=bool(run.model.quantization.cache),
        num_checkpoints=num_kept_checkpoints(run, steps),
    )


def _device_words(number: int) -> list[str]:
    return ["--trainer.devices", str(number), "--trainer.num_nodes", "1"]


def devices_of(trainer: Any) -> int:
    """Devices that a training file names, over all machines; 1 where it leaves that open.

    Args:
        trainer: The parsed settings.
    """
    devices = trainer.devices
    if isinstance(devices, list):
        number = len(devices)
    elif isinstance(devices, str) and "," in devices:
        number = len([part for part in devices.split(",") if part.strip()])
    else:
        number = int(devices) if str(devices).isdigit() else 1
    return max(1, number) * int(trainer.num_nodes)


def shape_of_run(run: Any) -> ModelShape:
    """The sizes of a run's base: a local folder's, a known model's, or an earlier download's.

    Raises:
        ConfigurationError: if it is none of these, or its config.json lacks a field.
    """
    name, model = str(run.model.model_name_or_path), run.model
    is_folder = Path(name).expanduser().is_dir()
    if not is_folder and short_name(name) is not None:
        return shape_from_config(known_shape(name))
    path = model_file(name, model.revision, model.cache_dir, "config.json")
    if path is None:
        raise ConfigurationError(
            f"model.model_name_or_path: '{name}' is neither a folder here, nor among the "
            f"{len(known_names())} models whose sizes are known, nor downloaded already; download "
            "its config.json into a folder and name that."
        )
    fields = read_config(path)
    if is_known_family(fields) or "model_type" not in fields:
        return shape_from_config(fields)
    from qlora_pl.modeling.base.quantization_plan import build_skeleton

    return shape_of_skeleton(
        build_skeleton(path.parent, model.attn_implementation, model.trust_remote_code)
    )


def _accumulation(run: Any, num_devices: int) -> int:
    """Micro-batches of a step on each device.

    Raises:
        ConfigurationError: if the rows of a step cannot be shared out.
    """
    if run.data.global_batch_size is None:
        return SHARE if run.data.batch_size == AUTO else run.trainer.accumulate_grad_batches or 1
    size = None if run.data.tokens_per_batch else run.data.batch_size
    if size == AUTO:  # of single rows, which are the least
        size = 1
    return accumulation_of(run.data.global_batch_size, size, num_devices)


def _auto_of(
    run: Any, setting: TrainingSetting, rows: RowFacts | None, accumulation: int
) -> AutoCut | None:
    """What is left to the run itself; None: nothing."""
    asked = run.data.batch_size, run.model.gradient_checkpointing
    if AUTO not in asked:
        return None
    width, size = setting.tokens_per_row, setting.batch_size
    found = choices(*asked, accumulation, size, width, can_recompute=True)
    if asked[0] != AUTO:
        return AutoCut(choices=tuple(found), rows_of_step=None)
    is_counted = rows is not None and not setting.is_packed
    return AutoCut(
        choices=tuple(found),
        rows_of_step=accumulation,
        most_trained=rows.most_trained if rows is not None and is_counted else None,
    )


def _rows_of(run: Any, reads_all: bool) -> tuple[RowFacts | None, str]:
    try:
        rows = read_rows(run, reads_all)
    except UnreadRowsError as error:
        return None, (
            f"the rows were not read ({error}), so every one is taken to be as long as "
            f"{_limits(run)} allow."
        )
    mean = f"{rows.mean_tokens:,.0f} tokens on average"
    return rows, (
        f"the {rows.num_rows:,} training rows were read: {mean}, and the largest micro-batch is "
        f"{rows.rows:,} x {rows.width:,}."
    )


def _limits(run: Any) -> str:
    if run.data.max_target_length is None:
        return f"data.max_length ({run.data.max_length:,}) would"
    return (
        f"data.max_length ({run.data.max_length:,}) and data.max_target_length "
        f"({run.data.max_target_length:,}) together"
    )


def with_rows(setting: TrainingSetting, rows: RowFacts) -> TrainingSetting:
    """A setting at the largest micro-batch of the rows that were read."""
    return replace(
        setting,
        batch_size=rows.rows,
        tokens_per_row=rows.width,
        target_tokens_per_row=rows.target_width or None,
        trained_tokens=rows.trained,
        has_mask=rows.has_padding,
    )


def _micro_batches_of_epoch(run: Any, rows: RowFacts | None, num_devices: int) -> int | None:
    """On one device; None: the rows were not counted."""
    if rows is not None:
        is_auto = run.data.batch_size == AUTO  # counted in single rows
        number = rows.num_rows if is_auto else rows.num_micro_batches
        return math.ceil(number / num_devices)
    limits = [source.limit or source.sample for source in run.data.sources.sources]
    if run.data.max_train_samples is not None:
        limits = [run.data.max_train_samples]
    if not all(limits) or run.data.tokens_per_batch or run.data.packing:
        return None
    size = 1 if run.data.batch_size == AUTO else run.data.batch_size
    return math.ceil(sum(limits) / (size * num_devices))


def _keys(run: Any, accumulation: int, rows: RowFacts | None) -> RunKeys:
    data = run.data
    return RunKeys(
        max_length=data.max_length,
        max_target_length=data.max_target_length,
        has_two_limits=data.encoding == "original" and data.max_target_length is not None,
        global_batch_size=data.global_batch_size,
        accumulation=accumulation,
        sets_accumulation=data.global_batch_size is not None
        and run.trainer.accumulate_grad_batches is not None,
        weighs_micro_batches=run.model.normalize_loss_by == "micro_batches",
        tokens_per_batch=data.tokens_per_batch,
        overlong=data.overlong,
        max_lost_ratio=data.max_lost_ratio,
        share_lost=None if rows is None else rows.share_lost,
    )
