"""What saving and leaving cost: the pause of a save, seconds from SIGTERM to exit, and to go on.

    python benchmarks/saving.py [--strategy ddp]

A run of the command line over a synthetic base saves every third step; it gets SIGTERM in the
middle of a step, and is started again with ``--ckpt_path auto``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import hear, start_ranks
from synthetic import save_base, write_rows

SAVES_EVERY = 3
STOPPED_AFTER = 10
"""The step after which the signal comes."""
LAYOUTS = [("one", 1), ("ddp", 2), ("fsdp2", 2)]


def rank(words: list[str]) -> int:
    """One process of ``qlora-pl fit``, which also says when its steps end and what saves took."""
    from qlora_pl.__main__ import main as qlora_pl
    from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint

    def note(kind: str, step: int, seconds: float = 0.0) -> None:
        value = {"kind": kind, "step": step, "seconds": seconds, "at": time.time()}
        print("EVENT" + json.dumps(value), flush=True)

    begin, end = AdapterCheckpoint.on_train_batch_start, AdapterCheckpoint.on_train_batch_end
    at_exception = AdapterCheckpoint.on_exception
    last = [-1]

    def timed_begin(self: Any, trainer: Any, *rest: Any) -> None:
        if last[0] < 0:
            last[0] = trainer.global_step
            note("begins", trainer.global_step)
        newest, started = self.saved_steps[-1:], time.perf_counter()
        begin(self, trainer, *rest)
        kind = "no save" if self.saved_steps[-1:] == newest else "save"
        note(kind, trainer.global_step, time.perf_counter() - started)

    def timed_end(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step > last[0]:
            last[0] = trainer.global_step
            note("step", trainer.global_step)
        end(self, trainer, *rest)

    def timed_exception(self: Any, *rest: Any) -> None:
        at_exception(self, *rest)
        note("written", last[0])  # all that the run leaves behind

    AdapterCheckpoint.on_exception = timed_exception  # type: ignore[method-assign]
    AdapterCheckpoint.on_train_batch_start = timed_begin  # type: ignore[method-assign]
    AdapterCheckpoint.on_train_batch_end = timed_end  # type: ignore[method-assign]
    sys.argv = ["qlora-pl", *words]
    return qlora_pl()


def write_config(
    folder: Path, strategy: str, num_ranks: int, lora_rank: int, accelerator: str
) -> Path:
    """A run that would go on for a thousand steps."""
    config = {
        "run": {"name": "saved", "root": str(folder / "runs")},
        "model": {
            "model_name_or_path": str(folder / "base"),
            "lora": {"r": lora_rank},
            "optimizer": {"name": "adamw_torch"},
        },
        "data": {
            "sources": str(folder / "rows.jsonl"),
            "template": "guanaco",
            "val_size": 4,
            "batch_size": 4 // num_ranks,
        },
        "samples": {"prompts": []},
        "checkpoint": {"every_n_steps": SAVES_EVERY},
        "trainer": {
            "accelerator": accelerator,
            "devices": num_ranks,
            "strategy": "auto" if strategy == "one" else strategy,
            "max_steps": 1000,
            "accumulate_grad_batches": 1,
            "enable_progress_bar": False,
        },
    }
    path = folder / "run.yaml"  # JSON is YAML
    path.write_text(json.dumps(config))
    return path


def start(folder: Path, num_ranks: int, *words: str) -> list[subprocess.Popen[str]]:
    """The run's processes."""
    arguments = ["--run", "fit", "--config", str(folder / "run.yaml"), *words]
    return start_ranks(Path(__file__), arguments, num_ranks, QLORA_PL_CACHE=folder / "cache")


def until(ranks: list[subprocess.Popen[str]], kind: str, step: int) -> list[dict[str, Any]]:
    """What rank 0 notes up to an event, which every rank is waited for."""
    events: list[dict[str, Any]] = []
    for process in ranks:
        while True:
            event = json.loads(hear([process], "EVENT")[0])
            if process is ranks[0]:
                events.append(event)
            if event["kind"] == kind and event["step"] >= step:
                break
    return events


def leave(ranks: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """Send SIGTERM to all, and wait; seconds until all was written, and until all were gone."""
    sent = time.time()
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate()[0] for process in ranks]
    gone = time.time() - sent
    lines = [line.removeprefix("EVENT") for line in said[0].splitlines() if "EVENT" in line]
    written = [event["at"] for event in map(json.loads, lines) if event["kind"] == "written"]
    codes = [process.returncode for process in ranks]
    if not written or codes != [128 + signal.SIGTERM] * len(ranks):
        raise RuntimeError(f"The run did not leave in order, exit codes {codes}:\n{said[0]}")
    return {"to_written": written[0] - sent, "to_exit": gone, "exit_codes": codes}


def measure(
    folder: Path, strategy: str, num_ranks: int, lora_rank: int, accelerator: str = "cpu"
) -> dict[str, Any]:
    """One layout: saves, a signal, going on, and another signal."""
    write_config(folder, strategy, num_ranks, lora_rank, accelerator)
    ranks = start(folder, num_ranks)
    try:
        events = until(ranks, "step", STOPPED_AFTER)
        left = [leave(ranks)]
        again = time.time()
        ranks = start(folder, num_ranks, "--ckpt_path", "auto")
        later = until(ranks, "step", STOPPED_AFTER + 1)
        left.append(leave(ranks))
    finally:
        for process in ranks:
            process.kill()
    begins, first = later[0], next(event for event in later if event["kind"] == "step")
    ends = [event["at"] for event in events if event["kind"] == "step"]
    pauses = {
        kind: [event["seconds"] for event in events if event["kind"] == kind]
        for kind in ("save", "no save")
    }
    return {
        "strategy": strategy,
        "processes": num_ranks,
        "seconds_between_steps": statistics.median(
            after - before for before, after in itertools.pairwise(ends)
        ),
        "first_save_seconds": pauses["save"][0],
        "save_seconds": pauses["save"][1:],
        "no_save_seconds": statistics.median(pauses["no save"]),
        "checkpoint_bytes": max(p.stat().st_size for p in folder.glob("runs/**/*.ckpt")),
        "sigterm_to_written_seconds": [one["to_written"] for one in left],
        "sigterm_to_exit_seconds": [one["to_exit"] for one in left],
        "exit_codes": [one["exit_codes"] for one in left],
        "resumed_at_step": begins["step"],
        "restart_to_batch_seconds": begins["at"] - again,
        "restart_to_step_seconds": first["at"] - again,
    }


def measure_all(lora_rank: int, layouts: list[tuple[str, int]]) -> dict[str, Any]:
    """Every layout, in a folder of its own."""
    runs = []
    for number, (strategy, num_ranks) in enumerate(layouts, start=1):
        place = f"{number}/{len(layouts)}"
        print(f"saving {place}: {strategy} on {num_ranks}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            save_base(folder / "base")
            write_rows(folder / "rows.jsonl", 256, 64)
            runs.append(measure(folder, strategy, num_ranks, lora_rank))
    return {"lora_rank": lora_rank, "runs": runs}


def main() -> int:
    """Print every layout's seconds as JSON; see scale.py."""
    if sys.argv[1:2] == ["--run"]:
        return rank(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--strategy", choices=[name for name, _ in LAYOUTS])
    arguments = parser.parse_args()
    layouts = [one for one in LAYOUTS if arguments.strategy in (None, one[0])]
    print(json.dumps(measure_all(arguments.lora_rank, layouts), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
