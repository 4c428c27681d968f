"""Other programs over the same weights and rows, set up as their documentation shows.

transformers' Trainer with PEFT pads the rows of each micro-batch; TRL's SFTTrainer is given the
same packs. Logging, saving and evaluation are off on all sides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.benching.clock import StepClock
from qlora_pl.benching.device import chosen_device
from qlora_pl.benching.rows import PAD_ID
from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.benching.training import ALPHA
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.modeling.base.quantization import resolve_compute_dtype
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig

Steps = Sequence[Sequence[Sequence[Sequence[int]]]]
"""Row numbers by step, micro-batch and line."""
OPTIMIZERS = {
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_lion_32bit": "paged_lion_32bit",
    "paged_lion_8bit": "paged_lion_8bit",
    "adamw_32bit": "adamw_bnb_32bit",
    "adamw_8bit": "adamw_bnb_8bit",
    "lion": "lion_32bit",
    "sgd": "sgd",
    "adamw_torch": "adamw_torch",
}
"""This program's names, and transformers'."""
CLIP = 0.3


def run_transformers(
    base: Path,
    rows: EncodedRows,
    steps: Steps,
    workload: Workload,
    timing: Timing,
    accumulation: int,
) -> tuple[StepClock, list[float]]:
    """Transformers' Trainer over a PEFT model that was prepared for training in few bits.

    Args:
        base: The packed base.
        rows: All rows.
        steps: Which of them each step has.
        workload: What is trained.
        timing: Which steps are timed.
        accumulation: Micro-batches that a step's rows are cut into.

    Returns:
        The clock, and the loss of each step.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    device = chosen_device(workload)
    clock = StepClock(timing, device)
    model = _load(base, workload, device)
    if workload.quant_type != "none":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=workload.checkpointing == "all"
        )
    model = get_peft_model(model, _lora(workload))
    items = [batch for step in steps for batch in _cut(step, accumulation)]
    arguments = TrainingArguments(
        **_arguments(workload, timing, device),
        per_device_train_batch_size=1,  # an item is a micro-batch
        gradient_accumulation_steps=accumulation,
        remove_unused_columns=False,
    )
    losses: list[Any] = []
    trainer = _in_order(Trainer, clock, losses)(
        model=model,
        args=arguments,
        train_dataset=_Items(items),
        data_collator=lambda chosen: _padded(rows, chosen[0]["rows"]),
    )
    trainer.train()
    return clock, _by_step(losses, accumulation, timing)


def run_trl(
    base: Path,
    rows: EncodedRows,
    steps: Steps,
    workload: Workload,
    timing: Timing,
    accumulation: int,
) -> tuple[StepClock, list[float]]:
    """TRL's SFTTrainer; takes and returns the same.

    A line of this program's is an item of its data set, with the lengths of the rows in it, as its
    own packing makes them.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    device = chosen_device(workload)
    clock = StepClock(timing, device)
    lines = [line for step in steps for batch in step for line in batch]
    pairs = [[rows[row] for row in line] for line in lines]
    columns = {
        "input_ids": [[t for ids, _ in line for t in ids.tolist()] for line in pairs],
        "labels": [[t for _, labels in line for t in labels.tolist()] for line in pairs],
    }
    if workload.packing:
        columns["seq_lengths"] = [[len(ids) for ids, _ in line] for line in pairs]
    arguments = SFTConfig(
        **_arguments(workload, timing, device),
        per_device_train_batch_size=workload.lines,
        gradient_accumulation_steps=workload.accumulation,
        max_length=None,
        padding_free=workload.packing,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    losses: list[Any] = []
    trainer = _in_order(SFTTrainer, clock, losses)(
        model=_load(base, workload, device),
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(base, trust_remote_code=False),
        peft_config=_lora(workload),
    )
    trainer.train()
    return clock, _by_step(losses, workload.accumulation, timing)


PEERS: dict[str, Callable[..., tuple[StepClock, list[float]]]] = {
    "hf": run_transformers,
    "trl": run_trl,
}


def _load(base: Path, workload: Workload, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    given = {} if workload.attention == "auto" else {"attn_implementation": workload.attention}
    dtype = resolve_compute_dtype(workload.compute_dtype, device)
    return AutoModelForCausalLM.from_pretrained(
        base, device_map={"": str(device)}, dtype=dtype, **given
    )


def _lora(workload: Workload) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=workload.r,
        lora_alpha=ALPHA,
        lora_dropout=workload.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _arguments(workload: Workload, timing: Timing, device: torch.device) -> dict[str, Any]:
    dtype = resolve_compute_dtype(workload.compute_dtype, device)
    return {
        "output_dir": tempfile.mkdtemp(prefix="qlora-pl-bench-"),
        "max_steps": timing.num_steps,
        "learning_rate": OptimizerConfig().lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "optim": OPTIMIZERS[workload.optimizer],
        "gradient_checkpointing": workload.checkpointing == "all",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "seed": workload.seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class _Items(torch.utils.data.Dataset):
    """Micro-batches in their order."""

    def __init__(self, items: list[list[int]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"rows": self.items[number]}


def _in_order(kind: Any, clock: StepClock, losses: list[Any]) -> Any:
    """A trainer that takes its items in their order, keeps losses on the device, and is timed."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

    class InOrder(kind):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.add_callback(Ticks())

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            losses.append(loss.detach())
            return loss

    return InOrder


def _cut(step: Sequence[Sequence[Sequence[int]]], accumulation: int) -> list[list[int]]:
    """A step's rows in so many micro-batches: this program's own, or parts of equal size."""
    if accumulation == len(step):
        return [[row for line in batch for row in line] for batch in step]
    flat = [row for batch in step for line in batch for row in line]
    return [flat[place::accumulation] for place in range(accumulation)]


def _padded(rows: EncodedRows, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    pairs = [rows[row] for row in chosen]
    width = max(len(ids) for ids, _ in pairs)
    ids = torch.full((len(pairs), width), PAD_ID)
    labels = torch.full((len(pairs), width), IGNORE_INDEX)
    mask = torch.zeros((len(pairs), width), dtype=torch.int64)
    for place, (own, trained) in enumerate(pairs):
        ids[place, : len(own)] = torch.from_numpy(own)
        labels[place, : len(own)] = torch.from_numpy(trained)
        mask[place, : len(own)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _by_step(losses: Sequence[Any], accumulation: int, timing: Timing) -> list[float]:
    """Losses of micro-batches, each a share of its step's mean -> those of steps."""
    values = torch.stack(list(losses)).float().view(-1, accumulation)[: timing.num_steps]
    found: list[float] = values.sum(dim=1).tolist()
    return found
