"""What `qlora-pl bench` itself costs a step, and whether its clock agrees with a bare loop's.

    python benchmarks/bench_overhead.py [--pairs 5] [--steps 20] [--out FILE]

Three clocks over the same tiny model (the worst case: its steps are short): the step timer within
Lightning's trainer; the time that the timer's own hook takes, which is what it adds; and the same
micro-batches with the same optimizer in a bare loop. In one process, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qlora_pl.benching.measuring import settings_of, train_module, vocabulary_of
from qlora_pl.benching.rows import draw_rows, training_batches
from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.benching.surroundings import describe_surroundings
from qlora_pl.benching.synthetic import SyntheticModule, write_config
from qlora_pl.benching.timer import StepTimer
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig, build_optimizer
from qlora_pl.modeling.steps.loss import causal_lm_loss

SHAPE = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


class Stopwatch:
    """How long the hook of another callback takes."""

    def __init__(self, timer: StepTimer) -> None:
        self.seconds: list[float] = []
        hook = timer.on_train_batch_end

        def watched(*arguments: Any) -> None:
            began = time.perf_counter()
            hook(*arguments)
            self.seconds.append(time.perf_counter() - began)

        timer.on_train_batch_end = watched  # type: ignore[method-assign]


def through_the_trainer(folder: Path, workload: Workload, timing: Timing) -> dict[str, Any]:
    """Median of the timer's steps, and of what its own hook took."""
    module = SyntheticModule(folder, "overhead", **settings_of(workload))
    rows = draw_rows(workload, vocabulary_of(module), timing.num_steps)
    import qlora_pl.benching.measuring as measuring

    watches = []

    class Watched(StepTimer):
        def __init__(self, timing: Timing) -> None:
            super().__init__(timing)
            watches.append(Stopwatch(self))

    measuring.StepTimer = Watched  # type: ignore[misc]
    try:
        timer = train_module(module, rows, workload, timing)
    finally:
        measuring.StepTimer = StepTimer  # type: ignore[misc]
    assert timer.clock is not None
    hooks = watches[0].seconds[timing.warmup : timing.warmup + timing.num_timed]
    seconds = timer.clock.seconds()
    return {
        "step_seconds": statistics.median(seconds),
        "hook_seconds": statistics.median(hooks),
        "overhead_ratio": sum(hooks) / sum(seconds),
        "model": module.model,
    }


def bare_loop(model: Any, workload: Workload, timing: Timing) -> float:
    """Median seconds of the same step without a trainer."""
    rows = draw_rows(workload, SHAPE["vocab_size"], timing.num_steps)
    batches = training_batches(rows, workload)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(OptimizerConfig(name=workload.optimizer), trained)
    seconds = []
    began = time.perf_counter()
    for step in range(timing.warmup + timing.num_timed):
        loss = causal_lm_loss(model, batches[batches.key_at(0, step)])
        (loss.total / loss.weight).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 0.3)
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    return statistics.median(seconds[timing.warmup :])


def main() -> None:
    """Take turns, and print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    timing = Timing(steps=arguments.steps, profiled=0)
    workload = Workload(
        shape="overhead", tokens_per_micro=512, seq=256, r=16, optimizer="adamw_torch",
        checkpointing="none", compute_dtype="float32",
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_config(Path(temporary), SHAPE)
        for pair in range(arguments.pairs):
            one = through_the_trainer(folder, workload, timing)
            one["bare_step_seconds"] = bare_loop(one.pop("model"), workload, timing)
            found.append(one)
            print(f"pair {pair + 1}: {one}", flush=True)
    record = {
        "environment": describe_surroundings(),
        "steps": arguments.steps,
        "medians": {key: statistics.median(one[key] for one in found) for key in found[0]},
        "largest_overhead_ratio": max(one["overhead_ratio"] for one in found),
        "trainer_over_bare": statistics.median(
            one["step_seconds"] / one["bare_step_seconds"] for one in found
        ),
        "pairs": found,
    }
    print(json.dumps({key: record[key] for key in record if key != "pairs"}, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
