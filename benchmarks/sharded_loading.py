"""Peak host memory while several processes load a base that they share (FSDP2), on CPUs.

    python benchmarks/sharded_loading.py --weights 1.0e9 [--ranks 2]

A synthetic LLaMA is loaded twice by gloo processes: quantised in this start, and read from the
packed copy. Counted is anonymous memory (PSS, summed over the processes) above what they hold when
a tiny base was loaded the same way, so that everything is imported, against the bytes of the packed
copy. Pages of mapped files are not anonymous.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loading import make_checkpoint
from processes import PeakMemory, hear, say, start_ranks

RANK_OF_ADAPTERS = 16
MODEL, TINY = "model", "tiny"


def load(folder: Path) -> tuple[Any, Any]:
    """A base with adapters, cut over the processes; all of them call this together."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from qlora_pl.modeling.adapters.lora import LoRAConfig
    from qlora_pl.modeling.base.base_checksum import BaseWatch
    from qlora_pl.modeling.base.identity import identify_base
    from qlora_pl.modeling.base.prequantized import make_plan
    from qlora_pl.modeling.base.quantization import QuantizationConfig
    from qlora_pl.modeling.base.quantization_plan import build_skeleton
    from qlora_pl.modeling.loading.sharded_loading import Sharing, load_sharded

    config = QuantizationConfig(compute_dtype="bfloat16")
    identity = identify_base(str(folder), None, None)
    return load_sharded(
        identity,
        config,
        make_plan(folder, build_skeleton(folder), config),
        LoRAConfig(r=RANK_OF_ADAPTERS),
        sharing=Sharing(
            mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
            device=torch.device("cpu"),
            offload=False,
            makes_copy=dist.get_rank() == 0,
            barrier=dist.barrier,
        ),
        watch=BaseWatch(),
        seed=0,
    )


def rank(folder: Path) -> None:
    """One process: says when its imports are done, loads when it is told to, and says what."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    load(folder / TINY)
    dist.barrier()
    print("READY", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    base, model = load(folder / MODEL)
    seconds = time.perf_counter() - started
    adapters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    found = {"seconds": seconds, "source": base.source, "adapter_bytes": adapters}
    print("LOADED" + json.dumps(found), flush=True)
    sys.stdin.readline()
    dist.destroy_process_group()


def measure(folder: Path, num_ranks: int = 2) -> dict[str, Any]:
    """Load once in processes of its own; bytes, and seconds of the slowest.

    Args:
        folder: With the two bases, and the packed copies that were made of them.
        num_ranks: Processes.
    """
    cache = folder / "cache"
    ranks = start_ranks(Path(__file__), ["--load", str(folder)], num_ranks, QLORA_PL_CACHE=cache)
    try:
        hear(ranks, "READY")
        memory = PeakMemory([process.pid for process in ranks])
        with memory.watch():
            say(ranks)
            found = [json.loads(answer) for answer in hear(ranks, "LOADED")]
        held = memory.held
        say(ranks)
        for process in ranks:
            process.wait()
    finally:
        for process in ranks:
            process.kill()
    copies = [
        sum(path.stat().st_size for path in copy.glob("*.safetensors"))
        for copy in (cache / "packed").iterdir()
    ]
    packed = max(copies)  # the other one is the tiny base's
    return {
        "ranks": num_ranks,
        "source": found[0]["source"],
        "seconds": max(one["seconds"] for one in found),
        "peak_bytes": memory.peak,
        "held_bytes": held,
        "packed_bytes": packed,
        "adapter_bytes": found[0]["adapter_bytes"],
        "peak_over_packed": memory.peak / packed,
        "over_time": thinned(memory.over_time),
    }


def thinned(samples: list[tuple[float, int]], number: int = 60) -> list[tuple[float, int]]:
    """About so many of them, of each stretch the largest."""
    size = -(-len(samples) // number)
    stretches = (samples[start : start + size] for start in range(0, len(samples), size))
    return [(round(s[-1][0], 2), max(held for _, held in s)) for s in stretches]


def measure_both(num_weights: float, num_ranks: int, folder: Path) -> dict[str, Any]:
    """A base that is quantised in this start, and the same from the copy that it left."""
    counted = make_checkpoint(folder / MODEL, num_weights)
    make_checkpoint(folder / TINY, 0, width=128, inner=256, vocabulary=256)
    made = measure(folder, num_ranks)
    read = measure(folder, num_ranks)
    assert made["source"] == "quantised now"
    assert read["source"] == "read from the cache"
    return {"weights": counted, "made": made, "read": read}


def main() -> None:
    """Print both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, default=1.0e9)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--load", type=Path, help="(for the processes that this one starts)")
    arguments = parser.parse_args()
    if arguments.load:
        rank(arguments.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure_both(arguments.weights, arguments.ranks, Path(folder))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
