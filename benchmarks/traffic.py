"""Seconds and bytes of optimizer steps that several gloo processes take together.

A rank counts what it hands to torch's collectives in one step, through a dispatch mode that sees
C++'s calls as well; other steps are timed, and the loopback interface's counters are read around
them. The processes run in a network of their own where the system allows it (``unshare``), so that
nothing else is counted there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import hear, start_ranks
from synthetic import INNER, VOCABULARY, WIDTH, save_base, write_rows
from wire import Shape, traffic

GLOBAL_BATCH = 16
NUM_TOKENS = 64
RANK_OF_ADAPTERS = 16
WARM_UP, TIMED = 1, 3
"""Steps before the timed ones, and those; one more is counted."""
SMALL_BYTES = 1024
"""Exchanges below this are bookkeeping: sums of losses, norms, agreement on signals."""


def loopback_bytes() -> int:
    """What this machine, or this network namespace, has received from itself."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


def counting() -> Any:
    """A dispatch mode that notes each collective's kind and the bytes of its whole buffer."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    kinds = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter"}
    kinds |= {"allreduce": "all_reduce", "broadcast": "broadcast", "alltoall": "all_to_all"}

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, int]] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            namespace, _, name = func.name().partition("::")
            if namespace == "c10d":
                plain = name.lstrip("_")
                kind = next((kinds[start] for start in kinds if plain.startswith(start)), plain)
                tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
                # of a gather and a scatter the larger of input and output is the whole
                size = max((t.numel() * t.element_size() for t in tensors), default=0)
                self.seen.append((kind, size))
            return func(*args, **(kwargs or {}))

    return Counting()


def rank(settings: dict[str, Any]) -> None:
    """One process of a run; prints what it measured."""
    import torch.distributed as dist
    from lightning.pytorch import Callback, Trainer, seed_everything

    from qlora_pl.data.datamodule import InstructionDataModule
    from qlora_pl.modeling.adapters import LoRAConfig
    from qlora_pl.modeling.module import QLoRAModule
    from qlora_pl.modeling.optimizers import OptimizerConfig
    from qlora_pl.modeling.quantization import QuantizationConfig
    from qlora_pl.strategies.choice import strategy_named

    num_ranks = int(os.environ["WORLD_SIZE"])
    counter = counting()

    class Watch(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.step = -1
            self.received = 0

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if self.step == trainer.global_step:
                return
            self.step = trainer.global_step
            if self.step == WARM_UP:
                _meet(num_ranks)
                self.received = -loopback_bytes()
                _meet(num_ranks)
            if self.step == WARM_UP + TIMED:
                counter.__enter__()
            self.started = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == self.step:
                return
            self.seconds.append(time.perf_counter() - self.started)
            if self.step == WARM_UP + TIMED:
                counter.__exit__(None, None, None)
            if self.step == WARM_UP + TIMED - 1:
                _meet(num_ranks)
                self.received += loopback_bytes()

    def _meet(number: int) -> None:
        if number > 1:
            dist.barrier()

    seed_everything(1)
    watch, accumulation = Watch(), settings["accumulation"]
    module = QLoRAModule(
        settings["base"],
        quantization=QuantizationConfig(compute_dtype="bfloat16"),
        lora=LoRAConfig(r=RANK_OF_ADAPTERS),
        optimizer=OptimizerConfig(name="adamw_torch"),
        gradient_checkpointing=True,
    )
    data = InstructionDataModule(
        settings["rows"],
        template="guanaco",
        val_size=0,
        batch_size=GLOBAL_BATCH // (num_ranks * accumulation),
    )
    strategy = settings["strategy"] if settings["strategy"] != "one" else "auto"
    Trainer(
        default_root_dir=settings["folder"],
        max_steps=WARM_UP + TIMED + 1,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=0.3,
        accelerator="cpu",
        devices=num_ranks,
        strategy=strategy_named(strategy),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[watch],
    ).fit(module, data)
    measured = {
        "seconds": watch.seconds[WARM_UP : WARM_UP + TIMED],
        "loopback_bytes": watch.received / TIMED,
        "collectives": counter.seen,
    }
    print("MEASURED" + json.dumps(measured), flush=True)


def run(
    base: Path, rows: Path, strategy: str, num_ranks: int, accumulation: int
) -> list[dict[str, Any]]:
    """What each rank of one run measured."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "base": str(base),
            "rows": str(rows),
            "folder": folder,
            "strategy": strategy,
            "accumulation": accumulation,
        }
        arguments = ["--rank", json.dumps(settings)]
        ranks = start_ranks(
            Path(__file__), arguments, num_ranks, QLORA_PL_CACHE=base.parent / "cache"
        )
        try:
            found = [json.loads(answer) for answer in hear(ranks, "MEASURED")]
            for process in ranks:
                process.communicate()
        finally:
            for process in ranks:
                process.kill()
    return found


def shape_of(num_weights: int) -> Shape:
    """The synthetic base."""
    layer = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
    return Shape(
        name="synthetic",
        hidden=WIDTH,
        inner=INNER,
        num_layers=round((num_weights - 2 * VOCABULARY * WIDTH) / layer),
        vocabulary=VOCABULARY,
        key_value=WIDTH,
        rank=RANK_OF_ADAPTERS,
    )


def summarize(
    shape: Shape, strategy: str, num_ranks: int, accumulation: int, found: list[dict[str, Any]]
) -> dict[str, Any]:
    """A run's counts beside the formula's, whole bytes by kind, and what the interface counted."""
    counted: dict[str, int] = {}
    small = [0, 0]
    for kind, size in found[0]["collectives"]:
        if size < SMALL_BYTES:
            small = [small[0] + 1, small[1] + size]
        else:
            counted[kind] = counted.get(kind, 0) + size
    formula = traffic(
        shape, "ddp" if strategy in ("one", "ddp") else "fsdp2", num_ranks, accumulation
    )
    if num_ranks == 1:
        counted = {}
    expected = {
        kind: getattr(formula, kind)
        for kind in ("all_gather", "reduce_scatter", "all_reduce")
        if getattr(formula, kind) and num_ranks > 1
    }
    wire = num_ranks * formula.sent_by_gloo(num_ranks)
    received = found[0]["loopback_bytes"]
    return {
        "strategy": strategy,
        "processes": num_ranks,
        "accumulation": accumulation,
        "seconds_per_step": statistics.median(found[0]["seconds"]),
        "seconds": found[0]["seconds"],
        "counted_bytes": counted,
        "formula_bytes": expected,
        "is_equal": counted == expected,
        "sent_by_each": formula.sent(num_ranks) if num_ranks > 1 else 0,
        "bookkeeping": {"exchanges": small[0], "bytes": small[1]},
        "gloo_total_bytes": wire if num_ranks > 1 else 0,
        "loopback_bytes": received,
        "loopback_over_gloo": received / wire if num_ranks > 1 else None,
    }


def layouts() -> list[tuple[str, int, int]]:
    """Strategy, processes and accumulation of every run."""
    several = [(s, n) for n in (2, 4) for s in ("ddp", "fsdp2", "fsdp2_offload")]
    return [(s, n, a) for s, n in [("one", 1), *several] for a in (1, 4)]


def own_network() -> list[str]:
    """The words before a command that give it a loopback interface of its own; none: not here."""
    words = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return []
    done = subprocess.run([*words, "true"], capture_output=True, check=False)
    return words if done.returncode == 0 else []


def measure_all(folder: Path, repeats: int, chosen: list[tuple[str, int, int]]) -> dict[str, Any]:
    """Every layout, all of them once and then again, so that ratios are of neighbours."""
    shape = shape_of(save_base(folder / "base"))
    rows = write_rows(folder / "rows.jsonl", GLOBAL_BATCH * (WARM_UP + TIMED + 1), NUM_TOKENS)
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {layout: [] for layout in chosen}
    for repeat in range(repeats):
        for number, layout in enumerate(chosen):
            place = f"{repeat * len(chosen) + number + 1}/{repeats * len(chosen)}"
            print(f"traffic {place}: {layout}", file=sys.stderr, flush=True)
            summary = summarize(shape, *layout, run(folder / "base", rows, *layout))
            found[layout].append(summary)
    runs = []
    for of_layout in found.values():
        seconds = [one["seconds_per_step"] for one in of_layout]
        runs.append(of_layout[0] | {"seconds_per_step": statistics.median(seconds)})
        runs[-1]["spread"] = max(seconds) / min(seconds)
        runs[-1]["is_equal"] = all(one["is_equal"] for one in of_layout)
    return {
        "weights": shape.num_quantized + 2 * VOCABULARY * WIDTH,
        "layers": shape.num_layers,
        "adapter_weights": shape.num_adapter_weights,
        "rows_per_step": GLOBAL_BATCH,
        "tokens_per_row": NUM_TOKENS,
        "runs": runs,
    }


def main() -> None:
    """Print every layout's counts as JSON; see scale.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", help="strategy:processes:accumulation")
    parser.add_argument("--rank", help="(for the processes that this one starts)")
    arguments = parser.parse_args()
    if arguments.rank:
        rank(json.loads(arguments.rank))
        return
    network = own_network()
    if network and "QLORA_PL_OWN_NETWORK" not in os.environ:
        os.environ["QLORA_PL_OWN_NETWORK"] = "1"
        os.execvp(network[0], [*network, sys.executable, *sys.argv])
    chosen = layouts()
    if arguments.only:
        strategy, number, accumulation = arguments.only.split(":")
        chosen = [(strategy, int(number), int(accumulation))]
    with tempfile.TemporaryDirectory() as folder:
        result = measure_all(Path(folder), arguments.repeats, chosen)
    result["has_own_network"] = bool(network)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
