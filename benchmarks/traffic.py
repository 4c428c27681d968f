"""Seconds and bytes of optimizer steps that several gloo processes take together.

    python benchmarks/traffic.py [--only ddp:2:1]

Each layout is a run of its own (see traffic_rank.py). What its processes hand to torch's
collectives in a step is held against the formulas of wire.py, and so is what the loopback interface
received. The processes run in a network of their own where the system allows it (``unshare``), so
that nothing else is counted there.
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
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import hear, start_ranks
from synthetic import INNER, NUM_WEIGHTS, VOCABULARY, WIDTH, save_base, write_rows
from wire import Shape, Traffic, traffic

RANK_PROGRAM = Path(__file__).with_name("traffic_rank.py")
GLOBAL_BATCH = 16
NUM_TOKENS = 64
BOOKKEEPING_BYTES = 256
"""Exchanges below this are sums of losses, a norm, agreement on a signal; the smallest part of the
model that travels alone, its last norm, has 1024 bytes."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread, and what of it is measured."""

    strategy: str
    processes: int
    accumulation: int = 1
    lora_rank: int = 16
    checkpointing: bool = True
    """Whether activations are computed again in the backward pass."""
    warm_up: int = 1
    """Steps that nothing is measured of."""
    timed: int = 3
    """Steps that are timed, before the one that is counted."""

    @property
    def num_steps(self) -> int:
        """Of the run."""
        return self.warm_up + self.timed + 1


def layouts(is_quick: bool) -> list[Layout]:
    """Those of the published table, or the smallest that show anything."""
    if is_quick:
        return [Layout(strategy=name, processes=2, timed=1) for name in ("ddp", "fsdp2")]
    spread = [("one", 1, 1), ("ddp", 2, 1), ("ddp", 2, 4), ("ddp", 4, 1)]
    spread += [("fsdp2", 2, 1), ("fsdp2", 2, 4), ("fsdp2", 4, 1), ("fsdp2_offload", 2, 1)]
    return [Layout(strategy=s, processes=n, accumulation=a) for s, n, a in spread]


def run(base: Path, rows: Path, layout: Layout) -> list[dict[str, Any]]:
    """What each process of one run measured.

    Args:
        base: From ``save_base``.
        rows: From ``write_rows``; enough for the layout's steps.
        layout: Of the run; its processes and micro-batches divide ``GLOBAL_BATCH``.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = asdict(layout) | {
            "base": str(base),
            "rows": str(rows),
            "folder": folder,
            "batch_size": GLOBAL_BATCH // (layout.processes * layout.accumulation),
        }
        cache = base.parent / "cache"
        ranks = start_ranks(
            RANK_PROGRAM, [json.dumps(settings)], layout.processes, QLORA_PL_CACHE=cache
        )
        try:
            found = [json.loads(answer) for answer in hear(ranks, "MEASURED")]
            for process in ranks:
                process.communicate()
        finally:
            for process in ranks:
                process.kill()
    return found


def shape_of(num_weights: int, lora_rank: int) -> Shape:
    """The synthetic base under adapters."""
    layer = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
    return Shape(
        name="synthetic",
        hidden=WIDTH,
        inner=INNER,
        num_layers=round((num_weights - 2 * VOCABULARY * WIDTH) / layer),
        vocabulary=VOCABULARY,
        key_value=WIDTH,
        rank=lora_rank,
    )


def predicted(shape: Shape, layout: Layout) -> Traffic:
    """What the formulas say of a run."""
    if layout.strategy == "one":
        return Traffic()
    strategy = layout.strategy.removesuffix("_offload")
    return traffic(shape, strategy, layout.processes, layout.accumulation)


def summarize(shape: Shape, layout: Layout, found: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's counts beside the formula's, by kind, and what the interface received.

    ``is_equal`` says whether every process counted just the formula's bytes and exchanges.
    """
    formula = predicted(shape, layout)
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    expected = {kind: getattr(formula, kind) for kind in kinds if getattr(formula, kind)}
    counts, exchanges = zip(*(_whole(one["collectives"]) for one in found), strict=True)
    bookkeeping = [size for _, size in found[0]["collectives"] if size < BOOKKEEPING_BYTES]
    gloo = layout.processes * formula.sent_by_gloo(layout.processes)
    received = found[0]["loopback_bytes"]
    return asdict(layout) | {
        "seconds_per_step": statistics.median(found[0]["seconds"]),
        "seconds": found[0]["seconds"],
        "counted_bytes": counts[0],
        "formula_bytes": expected,
        "counted_exchanges": exchanges[0],
        "formula_exchanges": formula.num_messages,
        "is_equal": all(one == expected for one in counts)
        and all(number == formula.num_messages for number in exchanges),
        "sent_by_each_bytes": formula.sent(layout.processes),
        "bookkeeping": {"exchanges": len(bookkeeping), "bytes": sum(bookkeeping)},
        "gloo_bytes": gloo,
        "loopback_bytes": received,
        "loopback_over_gloo": received / gloo if gloo else None,
    }


def _whole(collectives: list[tuple[str, int]]) -> tuple[dict[str, int], int]:
    """Bytes by kind, and exchanges, without bookkeeping."""
    by_kind: Counter[str] = Counter()
    number = 0
    for kind, size in collectives:
        if size >= BOOKKEEPING_BYTES:
            by_kind[kind] += size
            number += 1
    return dict(by_kind), number


def own_network() -> list[str]:
    """The words before a command that give it a loopback interface of its own; none: not here."""
    words = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return []
    done = subprocess.run([*words, "true"], capture_output=True, check=False)
    return words if done.returncode == 0 else []


def measure_all(folder: Path, chosen: list[Layout]) -> dict[str, Any]:
    """Every layout once, over the same base and rows."""
    counted = save_base(folder / "base", NUM_WEIGHTS)
    num_steps = max(layout.num_steps for layout in chosen)
    rows = write_rows(folder / "rows.jsonl", GLOBAL_BATCH * num_steps, NUM_TOKENS)
    runs = []
    for number, layout in enumerate(chosen, start=1):
        words = f"{layout.strategy} on {layout.processes}, {layout.accumulation} micro-batches"
        print(f"traffic {number}/{len(chosen)}: {words}", file=sys.stderr, flush=True)
        shape = shape_of(counted, layout.lora_rank)
        runs.append(summarize(shape, layout, run(folder / "base", rows, layout)))
    return {
        "weights": counted,
        "layers": shape.num_layers,
        "adapter_weights": shape.num_adapter_weights,
        "rows_per_step": GLOBAL_BATCH,
        "tokens_per_row": NUM_TOKENS,
        "runs": runs,
    }


def main() -> None:
    """Print every layout's counts as JSON; see scale.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="strategy:processes:accumulation")
    arguments = parser.parse_args()
    network = own_network()
    if network and "QLORA_PL_OWN_NETWORK" not in os.environ:
        os.environ["QLORA_PL_OWN_NETWORK"] = "1"
        os.execvp(network[0], [*network, sys.executable, *sys.argv])
    chosen = layouts(arguments.quick)
    if arguments.only:
        strategy, number, accumulation = arguments.only.split(":")
        chosen = [Layout(strategy=strategy, processes=int(number), accumulation=int(accumulation))]
    with tempfile.TemporaryDirectory() as folder:
        result = measure_all(Path(folder), chosen)
    result["has_own_network"] = "QLORA_PL_OWN_NETWORK" in os.environ
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
