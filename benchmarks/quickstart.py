"""The quickstart's training, timed beside the same training in transformers' Trainer with PEFT.

    python benchmarks/quickstart.py [--pairs 3] [--steps 12] [--out benchmarks/results/NAME.json]

Same base in NF4 with double quantisation, same adapters, optimizer, rows, batches and number of
steps; each measurement in a process of its own, the two in turn (A B A B ...), so that a drift of
the machine's speed falls on both. Quote the ratio of medians; single times are worth little on a
shared machine. Needs what ``make quickstart`` prepares, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

BASE = ".cache/quickstart/SmolLM2-135M-Instruct"
ROWS = "experiments/quickstart/train.jsonl"
BATCH_SIZE = 8
RANK, ALPHA, RATE = 16, 16, 2.0e-3
BACKENDS = ("qlora_pl", "transformers")


class Clock:
    """Times of optimizer steps, and of the parts before the first."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.parts: dict[str, float] = {}
        self.steps: list[float] = []
        self.losses: list[float] = []
        self._step_began = 0.0

    def part(self, name: str) -> None:
        """End a part of the start-up."""
        now = time.perf_counter()
        self.parts[name] = now - self.began
        self.began = now

    def begin_step(self) -> None:
        """An optimizer step begins."""
        self._step_began = time.perf_counter()

    def end_step(self) -> None:
        """It has ended."""
        self.steps.append(time.perf_counter() - self._step_began)


def batches(steps: int) -> tuple[Any, list[Any]]:
    """The tokenizer, and the very batches that a run of the quickstart trains on."""
    from qlora_pl import InstructionDataModule

    data = InstructionDataModule(
        ROWS, tokenizer=BASE, template="chat", max_length=128, val_size=0,
        batch_size=BATCH_SIZE, seed=0,
    )  # fmt: skip
    data.setup("fit")
    loader = data.train_dataloader()
    found = [batch for batch, _ in zip(loader, range(steps), strict=False)]
    return data.tokenizer, found


def run_qlora_pl(steps: int, clock: Clock) -> None:
    """Through Lightning, with this project's module and data; no saves, no samples."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from qlora_pl import InstructionDataModule, LoRAConfig, OptimizerConfig, QLoRAModule

    clock.part("imports")
    seed_everything(0)

    class Timer(Callback):
        def on_train_start(self, *_: Any) -> None:
            clock.part("load")

        def on_train_batch_start(self, *_: Any) -> None:
            clock.begin_step()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            clock.end_step()
            clock.losses.append(module.last_step.loss)

    module = QLoRAModule(
        BASE,
        lora=LoRAConfig(r=RANK, alpha=ALPHA),
        optimizer=OptimizerConfig(name="adamw_torch", lr=RATE),
        gradient_checkpointing=False,
    )
    data = InstructionDataModule(
        ROWS, template="chat", max_length=128, val_size=0, batch_size=BATCH_SIZE
    )
    trainer = Trainer(
        max_steps=steps, gradient_clip_val=0.3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[Timer()],
        default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(module, data)


def run_transformers(steps: int, clock: Clock) -> None:
    """Transformers' Trainer over the same batches, with PEFT as its documentation shows it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    clock.part("imports")
    set_seed(0)
    _, made = batches(steps)
    rows = [{"batch": batch} for batch in made]
    model = AutoModelForCausalLM.from_pretrained(
        BASE,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        device_map={"": "cpu"},
        dtype=torch.bfloat16,
    )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.part("load")

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin_step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

        def on_log(self, _: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=1,
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.3, optim="adamw_torch",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, weight_decay=0.0, gradient_checkpointing=False,
    )  # fmt: skip

    class InOrder(Trainer):  # the rows are whole batches already, in this project's order
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {key: value for key, value in rows[0]["batch"].items() if key != "row_ids"}

    InOrder(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Timer()],  # type: ignore[arg-type]
    ).train()


def measure(backend: str, steps: int) -> dict[str, Any]:
    """One process's figures; the first step is reported apart, since it warms everything up."""
    clock = Clock()
    {"qlora_pl": run_qlora_pl, "transformers": run_transformers}[backend](steps, clock)
    _, made = batches(steps)
    num_tokens = [int(batch["attention_mask"].sum()) for batch in made]
    later = clock.steps[1:]
    return {
        "backend": backend,
        "seconds": clock.parts | {"first_step": clock.steps[0]},
        "seconds_per_step": statistics.median(later),
        "tokens_per_second": sum(num_tokens[1:]) / sum(later),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "losses": clock.losses,
    }


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each, their ratios, and how far repeats of the same lie apart."""
    by = {name: [r for r in results if r["backend"] == name] for name in BACKENDS}
    figures = ("seconds_per_step", "tokens_per_second", "peak_rss_gib")
    medians = {
        name: {f: statistics.median(r[f] for r in runs) for f in figures}
        | {
            part: statistics.median(r["seconds"][part] for r in runs)
            for part in ("imports", "load", "first_step")
        }
        for name, runs in by.items()
    }
    ours, theirs = (medians[name] for name in BACKENDS)
    pairs = zip(*(by[name] for name in BACKENDS), strict=True)
    return {
        "medians": medians,
        "ratio": {name: ours[name] / theirs[name] for name in ours},
        "seconds_per_step_by_pair": [
            a["seconds_per_step"] / b["seconds_per_step"] for a, b in pairs
        ],
        "spread_of_repeats": {
            name: max(r["seconds_per_step"] for r in runs)
            / min(r["seconds_per_step"] for r in runs)
            for name, runs in by.items()
        },
        "largest_loss_difference": max(
            abs(a - b)
            for x, y in zip(*(by[name] for name in BACKENDS), strict=True)
            for a, b in zip(x["losses"], y["losses"], strict=False)
        ),
    }


def environment() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = ("torch", "lightning", "transformers", "peft", "bitsandbytes")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def main() -> None:
    """Measure one backend in this process, or both in turn in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--backend", choices=BACKENDS, help="measure this one, here, and print JSON"
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if arguments.backend:
        print("RESULT" + json.dumps(measure(arguments.backend, arguments.steps)))
        return
    results = []
    for pair in range(arguments.pairs):
        for backend in BACKENDS:
            words = [
                sys.executable,
                __file__,
                "--backend",
                backend,
                "--steps",
                str(arguments.steps),
            ]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
            results.append(json.loads(line.removeprefix("RESULT")))
            print(
                f"pair {pair + 1}, {backend}: {results[-1]['seconds_per_step']:.2f} s/step",
                flush=True,
            )
    report = {"environment": environment(), "steps": arguments.steps, **summarize(results)}
    report["runs"] = results
    print(json.dumps({key: report[key] for key in report if key != "runs"}, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
