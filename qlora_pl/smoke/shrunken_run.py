"""Which flags follow the user's own words, so that their run becomes small.

Only size, place and company are replaced; whatever else the file says is what is tried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_pl.smoke.first_rows import KEYS, FirstRows
from qlora_pl.smoke.random_base import RandomBase
from qlora_pl.smoke.row_check import RowCheck, few

KILLED_AFTER = 3
"""Optimizer steps."""
STEPS = 6
"""Of the run, which is resumed in between."""
MOST_TOKENS = 128
MOST_RANKS = 2
MOST_IN_BATCH = 2
"""Rows of a micro-batch, and micro-batches of a step."""
ANSWER_TOKENS = 4
LARGEST_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class ShrunkenRun:
    """What is started."""

    name: str
    flags: dict[str, Any]
    """After the user's words, by key."""
    ranks: int
    changes: list[str]
    """What is less than in the user's file."""
    not_tested: list[str]
    """What this machine, or a small run, cannot show."""

    @property
    def words(self) -> list[str]:
        """The flags as words of a command line."""
        return [word for key, value in self.flags.items() for word in (f"--{key}", str(value))]


def shrink(
    run: Any, base: RandomBase, tokenizer: Path, first: FirstRows, rows: RowCheck
) -> ShrunkenRun:
    """Make a run small.

    Args:
        run: Its parsed configuration.
        base: What stands for the base.
        tokenizer: The folder of the tokenizer.
        first: Where the rows lie.
        rows: What became of them.
    """
    ranks = number_of_ranks(run.trainer)
    flags: dict[str, Any] = {
        "model.model_name_or_path": base.folder,
        "model.revision": "null",
        "model.cache_dir": "null",
        "data.tokenizer": tokenizer,
        "run.name": "smoke",
        "ckpt_path": "auto",
        **base.flags,
    }
    flags |= dict(_of_rows(run, first, rows, ranks))
    flags |= dict(_of_trainer(run, ranks))
    flags |= dict(_of_model(run))
    if run.samples.num_prompts > 1:
        flags["samples.num_prompts"] = 1
    if run.samples.prompts:
        flags["samples.prompts"] = json.dumps(run.samples.prompts[:1])
    for group, decoding in (("samples", run.samples.decoding), ("model", run.model.decoding)):
        flags[f"{group}.decoding.max_new_tokens"] = min(decoding.max_new_tokens, ANSWER_TOKENS)
        if decoding.min_new_tokens > ANSWER_TOKENS:
            flags[f"{group}.decoding.min_new_tokens"] = ANSWER_TOKENS
    flags |= {
        "samples.every_n_steps": "null",
        "checkpoint.every_n_steps": KILLED_AFTER,
        "checkpoint.keep_last": 2,
    }
    return ShrunkenRun(
        name="smoke",
        flags=flags,
        ranks=ranks,
        changes=[*base.narrowed.changes, *_changes(run, flags, ranks)],
        not_tested=[*base.notes, *_not_tested(run, ranks)],
    )


def number_of_ranks(trainer: Any) -> int:
    """Processes that stand for the run's devices: two if it has several, or shares out by name."""
    devices = trainer.devices
    listed = isinstance(devices, list) and len(devices) > 1
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        parts = [part for part in devices.split(",") if part.strip()]
        listed = len(parts) > 1 or (devices.isdigit() and int(devices) > 1)
    is_several = listed or (isinstance(devices, int) and devices > 1) or trainer.num_nodes > 1
    is_shared = str(trainer.strategy).startswith(("ddp", "fsdp2")) or hasattr(
        trainer.strategy, "class_path"
    )
    return MOST_RANKS if is_several or is_shared else 1


def _of_rows(run: Any, first: FirstRows, rows: RowCheck, ranks: int) -> Iterator[tuple[str, Any]]:
    data = run.data
    for key in KEYS:
        if key in first.sources:
            yield f"data.{key}", json.dumps(first.sources[key], ensure_ascii=False)
    is_too_long = rows.longest > MOST_TOKENS
    if data.max_target_length is not None:
        target = min(data.max_target_length, MOST_TOKENS // 2)
        yield "data.max_target_length", target
        yield "data.max_length", min(data.max_length, MOST_TOKENS - target)
    elif rows.data.encoder.is_paired:
        yield "data.max_length", min(data.max_length, MOST_TOKENS // 2)
    else:
        yield "data.max_length", min(data.max_length, MOST_TOKENS)
        if is_too_long and data.encoding == "spans":
            yield "data.overlong", "cut_prompt"  # of a long question nothing else is trained
    if is_too_long or not rows.is_whole:
        yield "data.max_lost_ratio", 1.0
    yield "data.val_size", few(data.val_size)
    yield "data.num_workers", min(data.num_workers, 1)
    if data.window is not None:
        yield "data.window", min(data.window, 64)
    yield from _of_batches(run, ranks)


def _of_batches(run: Any, ranks: int) -> Iterator[tuple[str, Any]]:
    """A micro-batch and an accumulation of two, where the run's are larger."""
    data, trainer = run.data, run.trainer
    size = _rows_of_micro_batch(data)
    small = min(size, MOST_IN_BATCH)
    yield "data.batch_size", small
    if isinstance(data.eval_batch_size, int):
        yield "data.eval_batch_size", min(data.eval_batch_size, MOST_IN_BATCH)
    if data.tokens_per_batch is not None:
        yield "data.tokens_per_batch", min(data.tokens_per_batch, 2 * MOST_TOKENS)
        small = 1
    if data.global_batch_size is not None:
        yield "data.global_batch_size", small * ranks * accumulation(run)
    if trainer.accumulate_grad_batches is not None or data.global_batch_size is None:
        yield "trainer.accumulate_grad_batches", accumulation(run)


def _rows_of_micro_batch(data: Any) -> int:
    return data.batch_size if isinstance(data.batch_size, int) else MOST_IN_BATCH


def accumulation(run: Any) -> int:
    """Micro-batches of a step on each process."""
    if run.data.global_batch_size is None:
        return min(run.trainer.accumulate_grad_batches or 1, MOST_IN_BATCH)
    unit = 1 if run.data.tokens_per_batch else _rows_of_micro_batch(run.data)
    return MOST_IN_BATCH if run.data.global_batch_size > unit else 1


def _of_trainer(run: Any, ranks: int) -> Iterator[tuple[str, Any]]:
    trainer = run.trainer
    yield from {
        "trainer.accelerator": "cpu",
        "trainer.devices": ranks,
        "trainer.num_nodes": 1,
        "trainer.max_steps": STEPS,
        "trainer.max_epochs": -1,
        "trainer.min_steps": "null",
        "trainer.min_epochs": "null",
        "trainer.max_time": "null",
        "trainer.fast_dev_run": "false",
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "true",  # TensorBoard into the run's own folder, nothing over a network
        "trainer.enable_progress_bar": "false",
        "trainer.limit_train_batches": 1.0,
        "trainer.overfit_batches": 0.0,
    }.items()
    if trainer.limit_val_batches != 0:
        yield "trainer.limit_val_batches", 1
        yield "trainer.num_sanity_val_steps", min(1, abs(trainer.num_sanity_val_steps or 0))
        # Where the save is, and counted across epochs: the user's interval would not come.
        yield "trainer.val_check_interval", KILLED_AFTER * accumulation(run)
        yield "trainer.check_val_every_n_epoch", "null"


def _of_model(run: Any) -> Iterator[tuple[str, Any]]:
    model = run.model
    if str(model.attn_implementation).startswith("flash"):
        yield "model.attn_implementation", "auto"
    if model.quantization.block_size > LARGEST_BLOCK:
        yield "model.quantization.block_size", LARGEST_BLOCK
    if model.lora.init_from is not None:
        yield "model.lora.init_from", "null"
    if model.gradient_checkpointing not in (True, False):  # auto
        yield "model.gradient_checkpointing", "true"


# -- what is said about it -------------------------------------------------------------------------

TOLD = (
    "data.max_length",
    "data.max_target_length",
    "data.overlong",
    "data.batch_size",
    "data.global_batch_size",
    "data.tokens_per_batch",
    "data.val_size",
    "trainer.accumulate_grad_batches",
    "model.quantization.block_size",
    "model.gradient_checkpointing",
)
"""Keys whose change has a line of its own."""
TOLD_TOGETHER = (
    "data.max_lost_ratio",
    "data.eval_batch_size",
    "data.num_workers",
    "data.window",
    "trainer.overfit_batches",
    "trainer.limit_val_batches",
    "trainer.num_sanity_val_steps",
    "trainer.val_check_interval",
    "checkpoint.every_n_steps",
    "checkpoint.keep_last",
    "samples.num_prompts",
    "samples.every_n_steps",
    "samples.decoding.max_new_tokens",
    "samples.decoding.min_new_tokens",
    "model.decoding.max_new_tokens",
    "model.decoding.min_new_tokens",
)
"""Those that say how often and how much, in one line."""


def _changes(run: Any, flags: dict[str, Any], ranks: int) -> Iterator[str]:
    for key in TOLD:
        if _differs(run, flags, key):
            of = "instead of" if isinstance(_value(run, key), str) else "of"
            yield f"{key}: {flags[key]} {of} {_value(run, key)}"
    yield f"trainer: {STEPS} steps on the CPU, {ranks} process{'es' if ranks > 1 else ''}"
    if also := [f"{key} {flags[key]}" for key in TOLD_TOGETHER if _differs(run, flags, key)]:
        yield f"besides: {', '.join(also)}"


def _name_of(strategy: Any) -> str:
    return str(getattr(strategy, "class_path", strategy)).rpartition(".")[2]


def _value(run: Any, key: str) -> Any:
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _differs(run: Any, flags: dict[str, Any], key: str) -> bool:
    value = _value(run, key)
    written = "null" if value is None else str(value)
    return key in flags and str(flags[key]) != written


def _not_tested(run: Any, ranks: int) -> Iterator[str]:
    model, trainer = run.model, run.trainer
    yield "whether it fits into a GPU's memory, and how long it takes: qlora-pl plan"
    if str(model.optimizer.name).startswith("paged"):
        yield f"model.optimizer.name: {model.optimizer.name} does not page on a CPU"
    if str(model.attn_implementation).startswith("flash"):
        yield (
            f"model.attn_implementation: {model.attn_implementation} needs a GPU; the CPU's own "
            "stood in for it"
        )
    if model.quantization.compute_dtype == "float16":
        yield "model.quantization.compute_dtype: float16's loss scaler works on GPUs alone"
    if model.lora.init_from is not None:
        yield f"model.lora.init_from: '{model.lora.init_from}' does not fit a narrowed base"
    if trainer.logger not in (None, True, False):
        yield "trainer.logger: loggers of your own were left out"
    if trainer.num_nodes > 1:
        yield f"trainer.num_nodes: {trainer.num_nodes} machines; {ranks} processes stood for them"
    if ranks > 1:
        yield (
            f"trainer.strategy: {_name_of(trainer.strategy)} over NCCL; {ranks} processes talked "
            "over gloo, and validate, generate and merge took one"
        )
    if "auto" in (run.data.batch_size, model.gradient_checkpointing):
        yield "what auto comes to (data.batch_size, model.gradient_checkpointing) on a GPU"
    if run.data.window is not None:
        yield "data.sources: reading them as a stream"
