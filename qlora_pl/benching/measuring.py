"""One measurement in this process: a run of a shape, or a user's, and the record of it."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_pl.benching.advice import advice
from qlora_pl.benching.device_speed import measure_device
from qlora_pl.benching.figures import StepContent, loss_problem, throughput, utilisation
from qlora_pl.benching.prediction import compared, plan_of_workload, sheet_flops
from qlora_pl.benching.rows import DrawnData, draw_rows
from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.benching.shapes import refuse_long_rows, shape_named
from qlora_pl.benching.surroundings import describe_surroundings
from qlora_pl.benching.synthetic import SyntheticModule, drawing_seconds, write_config
from qlora_pl.benching.timer import StepTimer
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig, packed_bytes
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.modeling.steps.step import StepStatistics

logger = logging.getLogger(__name__)

RECORD = "qlora-pl bench"
"""By which a record is told from any other file of JSON."""
FORMAT = 1
"""Of the record; raised when a field changes its meaning."""
ALPHA = 16.0
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


def settings_of(workload: Workload) -> dict[str, Any]:
    """What a ``QLoRAModule`` is given for a workload; a step that does not fit is not split."""
    return {
        "quantization": QuantizationConfig(
            quant_type=workload.quant_type,
            double_quant=workload.double_quant if workload.is_four_bits else None,
            compute_dtype=workload.compute_dtype,
            cache=False,
        ),
        "lora": LoRAConfig(
            r=workload.r, alpha=ALPHA, dropout=workload.dropout, dtype=workload.adapter_dtype
        ),
        "optimizer": OptimizerConfig(name=workload.optimizer),  # type: ignore[arg-type]
        "gradient_checkpointing": workload.checkpointing == "all",
        "attn_implementation": workload.attention,
        "on_oom": "stop",
    }


def refuse_misfit(folder: Path, workload: Workload, device: torch.device) -> int:
    """Refuse what cannot be drawn here, before it is tried; the number of weights.

    Raises:
        ConfigurationError: if rows are longer than the model can read.
        HardwareError: if the weights alone are more than the device's free memory.
    """
    skeleton: Any = build_skeleton(folder, workload.attention)
    if skeleton.config.is_encoder_decoder:
        raise ConfigurationError(
            f"--shape: '{workload.shape}' has an encoder and a decoder, and rows drawn here are of "
            "one text; measure a run of yours with --config."
        )
    refuse_long_rows(skeleton.config, workload.seq, workload.shape)
    config = settings_of(workload)["quantization"]
    plan = plan_quantization(skeleton, config)
    rest = 2 if device.type == "cuda" else 4  # bytes, where the type is not known yet
    num_bytes = sum(
        packed_bytes(p.numel(), config)
        if config.is_quantized and name in plan.quantized
        else p.numel() * rest
        for name, p in skeleton.named_parameters()
    )
    free = free_bytes(device)
    if workload.memory_limit is not None:
        free = min(free, int(workload.memory_limit * 2**30))
    if num_bytes > free:
        raise HardwareError(
            f"--shape: the weights of '{workload.shape}' take {num_bytes / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free on this {device.type.upper()}; take a smaller shape."
        )
    return sum(p.numel() for p in skeleton.parameters())


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


def train_module(
    module: QLoRAModule, rows: EncodedRows, workload: Workload, timing: Timing
) -> StepTimer:
    """Train a module over rows in a workload's batches, and time it.

    Args:
        module: Its base is named by a folder, or drawn.
        rows: At least as many as the steps take.
        workload: How they are trained on.
        timing: Which steps are timed.
    """
    device = chosen_device(workload)
    limit_memory(workload, device)
    timer = StepTimer(timing)
    with _seeded(workload.seed), tempfile.TemporaryDirectory() as temporary:
        trainer = _trainer(workload, timing, timer, device, temporary)
        trainer.fit(module, DrawnData(rows, workload))
    return timer


def limit_memory(workload: Workload, device: torch.device) -> None:
    """Let this process have no more of a GPU than the workload says."""
    if workload.memory_limit is not None and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, workload.memory_limit * 2**30 / whole))


def _trainer(
    workload: Workload, timing: Timing, timer: StepTimer, device: torch.device, folder: str
) -> Any:
    from qlora_pl.cli import TRAINER_DEFAULTS  # slow to import
    from qlora_pl.training.trainer_settings import RunTrainer

    hush_lightning()
    settings: dict[str, Any] = TRAINER_DEFAULTS | {
        "accelerator": "gpu" if device.type == "cuda" else "cpu",
        "devices": 1,
        "max_steps": timing.num_steps,
        "max_epochs": -1,
        "accumulate_grad_batches": workload.accumulation,
        # As on the other side of a comparison: nothing but training.
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "default_root_dir": folder,
        "callbacks": [timer],
    }
    return RunTrainer(**settings)


def hush_lightning() -> None:
    """Let Lightning speak only when something is wrong; importing it undoes this."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)


def record_of(
    timer: StepTimer, module: Any, what: Mapping[str, Any], tokens_per_micro: int, plan: Any
) -> dict[str, Any]:
    """The record of a run whose steps were timed.

    Args:
        timer: Of the run.
        module: What was trained.
        what: Fields that say what was measured.
        tokens_per_micro: Tokens of a micro-batch, for the rate of products of their shape.
        plan: The ``MemoryPlan``; None: there is none.
    """
    assert timer.clock is not None
    assert timer.cost is not None
    device: torch.device = module.device
    contents = [content_of(step) for step in timer.timed]
    seconds = timer.clock.seconds()
    timing = timer.timing
    dtype = module.base.compute_dtype
    matrix = largest_matrix(module.model, module.plan)
    rates = measure_device(device, dtype, tokens_per_micro, matrix)
    speed = throughput(seconds, contents, timing.repeats)
    compute = utilisation(
        timer.cost,
        seconds,
        contents,
        module.gradient_checkpointing,
        rates["flops_per_second"],
        sheet_flops(device, dtype),
    )
    memory = {
        "of_first_step": timer.clock.peak_of_first,
        "of_timed_steps": timer.clock.peak,
        "before_loading": timer.bytes_before,
        "predicted": compared(plan, timer.clock.peak, timer.bytes_before),
    }
    parts = timer.parts.to_plain() if timer.parts else None
    losses = [step.loss for step in timer.statistics]
    record = {
        "record": RECORD,
        "format": FORMAT,
        **what,
        "timing": vars(timing) | {"follows_protocol": timing.follows_protocol},
        "environment": describe_surroundings(),
        "speed": speed,
        "compute": compute,
        "memory": memory,
        "parts": parts,
        "device_speed": rates,
        "loss": {"first": losses[0], "last": losses[-1], "of_steps": losses},
        "setup_seconds": timer.setup_seconds,
        "first_step_seconds": timer.first_step_seconds,
        "own_overhead_ratio": timer.clock.own_seconds / sum(seconds),
        "out_of_memory_splits": module.runner.num_splits,
    }
    record["advice"] = advice(record, module.gradient_checkpointing, device.type)
    return record


def content_of(step: StepStatistics) -> StepContent:
    """What a step was made of."""
    return StepContent(
        step.num_tokens,
        step.num_trained_tokens,
        step.num_padded_tokens,
        step.num_rows,
        step.num_token_pairs,
    )


def largest_matrix(model: nn.Module, plan: Any) -> tuple[int, ...]:
    """Outputs and inputs of the largest matrix that is packed, or of any adapted one."""
    shapes = list(plan.quantized.values()) or [
        tuple(p.shape) for p in model.parameters() if p.ndim == 2
    ]
    largest: tuple[int, ...] = max(shapes, key=math.prod)
    return largest


def chosen_device(workload: Workload) -> torch.device:
    """Where it is measured.

    Raises:
        HardwareError: if a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if workload.device == "cuda" and not has_gpu:
        raise HardwareError("--device: torch finds no CUDA device here; leave it out.")
    if workload.memory_limit is not None and (workload.device == "cpu" or not has_gpu):
        raise HardwareError("--memory-limit: only a GPU's memory can be limited; leave it out.")
    is_gpu = has_gpu and workload.device != "cpu"
    return torch.device("cuda", 0) if is_gpu else torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; of a host, what it could make free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """As ``seed_everything`` leaves a run, and afterwards as it was."""
    from lightning.pytorch import seed_everything

    before = os.environ.get("PL_GLOBAL_SEED")
    seed_everything(seed, verbose=False)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PL_GLOBAL_SEED", None)
        else:
            os.environ["PL_GLOBAL_SEED"] = before
