"""What `qlora-pl bench` itself costs a step: its timer on and off in turn, within one run.

    python benchmarks/bench_overhead.py [--pairs 200] [--repeats 5] [--out FILE]

A tiny model, whose short steps are the worst case. Each repeat is one training run, of pairs of
steps, one with the timer's hook and one without, in an order that is drawn, clocked by the callback
around it. The difference is compared with what the hook takes by itself, and with the same
steps off and off, which shows the noise. A bare loop over the same micro-batches, without
Lightning, says what the trainer costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import qlora_pl.benching.training as training
from qlora_pl.benching.measuring import vocabulary_of
from qlora_pl.benching.rows import draw_rows, training_batches
from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.benching.surroundings import describe_surroundings
from qlora_pl.benching.synthetic import SyntheticModule, write_config
from qlora_pl.benching.timer import StepTimer
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig, build_optimizer
from qlora_pl.modeling.steps.loss import causal_lm_loss

SHAPE = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
WARM_UP = 10
WORKLOAD = Workload(
    shape="overhead", tokens_per_micro=256, seq=64, r=16, optimizer="adamw_torch",
    checkpointing="none", compute_dtype="float32", lengths="fixed",
)  # fmt: skip


class Switched(StepTimer):
    """A step timer that hears of every other step alone, and how long its hook takes for those."""

    def __init__(self, timing: Timing) -> None:
        super().__init__(timing)
        self.hook_seconds: list[float] = []
        self.ends: list[float] = []
        """Of every step, after the hook, on this callback's own clock."""
        self.cpu_ends: list[float] = []
        """The same in seconds of the processor, which other work does not lengthen."""

    def on_train_batch_end(self, *arguments: Any) -> None:  # type: ignore[override]
        """The timer's, where it is this step's turn."""
        if is_on(len(self.ends)):
            began = time.perf_counter()
            super().on_train_batch_end(*arguments)
            self.hook_seconds.append(time.perf_counter() - began)
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())


def is_on(step: int) -> bool:
    """One of each two steps, drawn: what recurs every so many steps meets on and off alike."""
    pair, place = divmod(step, 2)
    return random.Random(pair).randrange(2) == place


def one_run(folder: Path, pairs: int) -> tuple[dict[str, Any], Any]:
    """Shares that the timer adds to a step, by the clock and by its own hook; the model."""
    # A timer that hears of half of the steps must not think that it is through.
    timing = Timing(warmup=WARM_UP, steps=2 * pairs + WARM_UP, profiled=0)
    module = SyntheticModule(folder, "overhead", **training.settings_of(WORKLOAD))
    rows = draw_rows(WORKLOAD, vocabulary_of(module), timing.num_steps)
    training.StepTimer = Switched  # type: ignore[misc]
    try:
        timer: Any = training.train_module(module, rows, WORKLOAD, timing)
    finally:
        training.StepTimer = StepTimer  # type: ignore[misc]
    found: dict[str, Any] = {}
    for name, ends in (("clock", timer.ends), ("processor", timer.cpu_ends)):
        steps = range(WARM_UP, WARM_UP + 2 * pairs, 2)
        seconds = [b - a for a, b in itertools.pairwise(ends)]  # of step 1 on
        took = {step: seconds[step - 1] for first in steps for step in (first, first + 1)}
        on = [took[first if is_on(first) else first + 1] for first in steps]
        off = [took[first + 1 if is_on(first) else first] for first in steps]
        added = [first / second - 1 for first, second in zip(on, off, strict=True)]
        idle = [first / second - 1 for first, second in zip(off[::2], off[1::2], strict=False)]
        found[name] = {
            "step_seconds_off": statistics.median(off),
            "added_ratio": statistics.median(added),
            "quartiles_of_pairs": statistics.quantiles(added, n=4),
            "off_against_off_ratio": statistics.median(idle),
        }
    hooks = timer.hook_seconds[WARM_UP // 2 :]
    found["hook"] = {
        "seconds": statistics.median(hooks),
        "most_seconds": max(hooks),
        "ratio": statistics.median(hooks) / found["clock"]["step_seconds_off"],
    }
    return found, module.model


def bare_loop(model: Any, steps: int) -> float:
    """Median seconds of the same step without a trainer."""
    rows = draw_rows(WORKLOAD, SHAPE["vocab_size"], steps)  # type: ignore[arg-type]
    batches = training_batches(rows, WORKLOAD)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(OptimizerConfig(name=WORKLOAD.optimizer), trained)  # type: ignore[arg-type]
    seconds = []
    began = time.perf_counter()
    for step in range(steps):
        loss = causal_lm_loss(model, batches[batches.key_at(0, step)])
        (loss.total / loss.weight).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 0.3)
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    return statistics.median(seconds[WARM_UP:])


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most over the repeats."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    """Take turns, and print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, help="of steps, on and off")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_config(Path(temporary), SHAPE)
        before = describe_surroundings()
        for repeat in range(arguments.repeats):
            one, model = one_run(folder, arguments.pairs)
            one["bare_step_seconds"] = bare_loop(model, arguments.pairs + WARM_UP)
            found.append(one)
            print(f"repeat {repeat + 1}: {json.dumps(one)}", flush=True)
    record = {
        "environment": before,
        "shape": SHAPE,
        "pairs": arguments.pairs,
        "added_ratio_by_the_clock": spread([one["clock"]["added_ratio"] for one in found]),
        "added_ratio_by_the_processor": spread([one["processor"]["added_ratio"] for one in found]),
        "hook_ratio": spread([one["hook"]["ratio"] for one in found]),
        "hook_seconds": spread([one["hook"]["seconds"] for one in found]),
        "trainer_over_bare": spread(
            [one["clock"]["step_seconds_off"] / one["bare_step_seconds"] for one in found]
        ),
        "repeats": found,
    }
    print(json.dumps({key: record[key] for key in record if key != "repeats"}, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
