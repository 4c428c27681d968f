"""What loading a base costs: seconds, and anonymous memory above what the imports hold.

    python benchmarks/loading.py --weights 1.0e9 [--folder FOLDER] [--kinds nf4 cached int8]

Makes a synthetic LLaMA checkpoint of about so many weights, sharded, and loads it in a process of
its own for each kind. Peak RSS would count mapped files; this reads RssAnon ten times a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WIDTH, INNER, VOCABULARY = 2048, 5504, 8192
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "cache": False},
    "cached": {"quant_type": "nf4", "cache": True},
    "fp4": {"quant_type": "fp4", "double_quant": False, "cache": False},
    "int8": {"quant_type": "int8", "cache": False},
    "bfloat16": {"quant_type": "none", "compute_dtype": "bfloat16"},
}


def make_checkpoint(
    folder: Path,
    num_weights: float,
    *,
    width: int = WIDTH,
    inner: int = INNER,
    vocabulary: int = VOCABULARY,
) -> int:
    """Write a random LLaMA of about so many weights, layer by layer; returns how many.

    Args:
        folder: Where to.
        num_weights: About how many; whole layers are made.
        width: Of the residual stream; like ``inner`` a multiple of 64. Heads are 128 or 64 wide.
        inner: Of the feed-forward layers.
        vocabulary: Rows of the embedding, and of a head of its own.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layer = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    size = sum(math.prod(shape) for shape in layer.values())
    num_layers = max(1, round((num_weights - 2 * vocabulary * width) / size))
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)

    places: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    write(
        "model-ends.safetensors",
        {
            "model.embed_tokens.weight": random(vocabulary, width),
            "lm_head.weight": random(vocabulary, width),
            "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
        },
    )
    for number in range(num_layers):
        prefix = f"model.layers.{number}."
        tensors = {f"{prefix}{name}.weight": random(*shape) for name, shape in layer.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        write(f"model-{number:03d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    num_heads = width // (128 if width >= 1024 else 64)
    LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return num_layers * size + 2 * vocabulary * width


def anonymous_bytes() -> int:
    """This process's RssAnon."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def load(folder: Path, kind: str) -> dict[str, float]:
    """Load in this process; seconds, and bytes above what the imports hold."""
    import bitsandbytes  # noqa: F401 (imported before the first reading)
    import peft  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from qlora_pl.modeling.base.identity import identify_base
    from qlora_pl.modeling.base.prequantized import make_plan
    from qlora_pl.modeling.base.quantization import QuantizationConfig
    from qlora_pl.modeling.base.quantization_plan import build_skeleton
    from qlora_pl.modeling.loading.base_loading import load_base
    from qlora_pl.modeling.parameters import count_parameters

    config = QuantizationConfig(**KINDS[kind])
    identity = identify_base(str(folder), None, None)
    plan = make_plan(folder, build_skeleton(folder), config)
    before, peak, is_done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.1):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        base = load_base(identity, config, plan, device=torch.device("cpu"))
        seconds = time.perf_counter() - started
    finally:
        is_done.set()
        watcher.join()
    after = anonymous_bytes()
    return {
        "seconds": seconds,
        "peak_bytes": max(peak, after) - before,
        "held_bytes": after - before,
        "stored_bytes": count_parameters(base.model).stored_bytes,
        "is_from_cache": base.is_from_cache,
    }


def measure(folder: Path, kind: str, cache: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--load", kind, "--folder", str(folder)],
        env={**os.environ, "QLORA_PL_CACHE": str(cache), "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print one line a kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=float, default=1.0e9)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--load", help="(for the processes that this one starts)")
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.folder, arguments.load)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        cache = Path(temporary) / "cache"
        num_weights = make_checkpoint(folder, arguments.weights)
        print(f"{num_weights:,} weights, {2 * num_weights / 1e9:.2f} GB in 16 bits")
        print("| kind | seconds | peak anonymous GB | held GB | stored GB |")
        print("| --- | --- | --- | --- | --- |")
        for kind in arguments.kinds:
            if kind == "cached":
                measure(folder, kind, cache)  # quantises, and keeps a copy
            result = measure(folder, kind, cache)
            assert result["is_from_cache"] is (kind == "cached")
            sizes = [result[key] / 1e9 for key in ("peak_bytes", "held_bytes", "stored_bytes")]
            print(
                f"| {kind} | {result['seconds']:.1f} | "
                + " | ".join(f"{s:.2f}" for s in sizes)
                + " |"
            )


if __name__ == "__main__":
    main()
