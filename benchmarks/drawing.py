"""What it costs to draw and pack a base of a known shape: seconds, and memory above its size.

    python benchmarks/drawing.py --shapes llama-1b llama2-7b [--out benchmarks/results/NAME.json]

Each shape in a process of its own. Memory is what comes above the imports: the peak of the resident
set as the system counts it, and anonymous memory as read ten times a second. On a CPU a 7B takes
some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import PeakMemory


def draw(shape: str) -> dict[str, Any]:
    """In this process."""
    import bitsandbytes  # noqa: F401 (imported before the first reading)
    import peft  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from qlora_pl.benching.clock import PeakMemory as ResidentPeak
    from qlora_pl.benching.clock import resident_bytes
    from qlora_pl.benching.surroundings import describe_surroundings
    from qlora_pl.benching.synthetic import draw_base, drawing_seconds, write_config
    from qlora_pl.modeling.base.quantization import QuantizationConfig
    from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
    from qlora_pl.modeling.loading.packed_model import named_tensors
    from qlora_pl.planning.shapes.known_shapes import known_shape

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = QuantizationConfig(cache=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_config(Path(temporary), known_shape(shape))
        skeleton = build_skeleton(folder)
        plan = plan_quantization(skeleton, config)
        before = describe_surroundings()
        weights = sum(p.numel() for p in skeleton.parameters())
        told = drawing_seconds(weights, config, device)
        resident, resident_before = ResidentPeak(torch.device("cpu")), resident_bytes()
        resident.reset()
        memory = PeakMemory([os.getpid()])
        began = time.perf_counter()
        with memory.watch():
            base = draw_base(folder, config, plan, device=device)
        seconds = time.perf_counter() - began
        held = memory.held
    most = resident.peak()["resident"] - resident_before
    stored = sum(t.numel() * t.element_size() for _, t in named_tensors(base.model))
    on_host = stored if device.type == "cpu" else 0
    return {
        "shape": shape,
        "weights": weights,
        "stored_bytes": stored,
        "seconds": seconds,
        "seconds_told_beforehand": told,
        "host_peak_resident_bytes": most,
        "host_peak_resident_above_stored_bytes": most - on_host,
        "host_peak_bytes": memory.peak,
        "host_held_bytes": held,
        "host_peak_above_stored_bytes": memory.peak - on_host,
        "environment": before,
    }


def main() -> None:
    """Each shape in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["llama-1b"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT" + json.dumps(draw(arguments.one)))
        return
    found = []
    for shape in arguments.shapes:
        done = subprocess.run(
            [sys.executable, __file__, "--one", shape], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(done.returncode)
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
        found.append(json.loads(line.removeprefix("RESULT")))
        print(json.dumps({k: v for k, v in found[-1].items() if k != "environment"}), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({"shapes": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
