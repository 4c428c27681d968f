"""What merging costs: time and memory by size, and what is lost by policy, type and 4 bits.

    python benchmarks/merging.py memory --weights 1.0e9 [--folder FOLDER] [--score-tokens 256]
    python benchmarks/merging.py loss --adapter runs/quickstart/version_0/adapter

``memory`` makes a random LLaMA and an adapter of rank 64 for it, merges them in a process of its
own, and scores in another; memory is the anonymous one of the whole process, ten times a second.
``loss`` merges an adapter in every way, and reads the scores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loading import anonymous_bytes, make_checkpoint
from synthetic import save_tokenizer, write_rows

RANK = 64
SHAPES = {
    "0.5e9": {"width": 2048, "inner": 5504, "vocabulary": 8192},
    "1e9": {"width": 2048, "inner": 5504, "vocabulary": 8192},
    "7e9": {"width": 4096, "inner": 11008, "vocabulary": 32000},
}
"""LLaMA-7B's own for 7e9: 32 layers, 6.74e9 weights."""
WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "nf4": {"dtype": "bfloat16", "requantize": "nf4"},
    "fp4": {"dtype": "bfloat16", "requantize": "fp4"},
}
"""In which form a merged model is written."""
ROW_TOKENS = 512
VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


def main() -> None:
    """Print JSON, one object a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "loss", "merge", "score"))
    parser.add_argument("--weights", default="0.5e9", help="a name of SHAPES, or a number")
    parser.add_argument("--folder", type=Path, help="where base and outputs go; kept")
    parser.add_argument("--adapter", help="loss: of which it is read")
    parser.add_argument("--data", help="loss: rows to score with; the adapter's own")
    parser.add_argument("--name", default="adapter", help="loss: what it is called")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="loss: of them")
    parser.add_argument("--score-tokens", type=int, default=256, help="memory: 0 scores nothing")
    parser.add_argument("--method", default="lora", choices=("lora", "dora"))
    given = parser.parse_args()
    if given.what == "loss":
        print(json.dumps(loss(given), indent=1))
    elif given.what == "memory":
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(memory(given, given.folder or Path(temporary)), indent=1))
    else:
        print(json.dumps({"merge": merge_here, "score": score_here}[given.what](given)))


# -- time and memory -------------------------------------------------------------------------------


def memory(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds and peaks of merging, and of scoring, each in a process of its own."""
    shape = SHAPES.get(given.weights, SHAPES["1e9"])
    base, adapter = folder / "base", folder / f"adapter-{given.method}"
    if not (base / "config.json").is_file():
        make_checkpoint(base, float(given.weights), **shape)
        save_tokenizer(base)
    if not adapter.is_dir():
        make_adapter(adapter, base, use_dora=given.method == "dora")
    write_rows(folder / "rows.jsonl", 8, ROW_TOKENS)
    result = {"versions": {name: version(name) for name in VERSIONED}, "method": given.method}
    result |= child("merge", given, folder)
    if given.score_tokens:
        result |= child("score", given, folder)
    return result


def child(what: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A part of it in a process of its own."""
    words = ["--folder", str(folder), "--method", given.method]
    words += ["--score-tokens", str(given.score_tokens)]
    environment = {"QLORA_PL_CACHE": str(folder / "cache"), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, __file__, what, *words],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{what} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_adapter(folder: Path, base: Path, use_dora: bool = False) -> None:
    """A random PEFT adapter on every linear module of a LLaMA, of such a size that it matters."""
    import peft
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    draw = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] not in targets:
            continue
        outputs, inputs = parameter.shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a = torch.randn(RANK, inputs, generator=draw) / inputs**0.5
        tensors[f"{stem}.lora_A.weight"] = a
        tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, RANK, generator=draw) * 1e-3
        if use_dora:  # rows of 0.02 x standard normal
            length = torch.full((outputs,), 0.02 * inputs**0.5)
            tensors[f"{stem}.lora_magnitude_vector"] = length
    peft.LoraConfig(
        r=RANK,
        lora_alpha=16,
        target_modules=targets,
        task_type="CAUSAL_LM",
        use_dora=use_dora,
        base_model_name_or_path=str(base),
    ).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@contextmanager
def watched(result: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds of a block, and the most anonymous memory of the process within it."""
    peak, is_done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.1):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        is_done.set()
        watcher.join()
    result[f"{name}_seconds"] = round(seconds, 1)
    result[f"{name}_peak_bytes"] = max(peak, anonymous_bytes())


def merge_here(given: argparse.Namespace) -> dict[str, Any]:
    """Merge in this process, without scoring."""
    import bitsandbytes  # noqa: F401 (imported before the first reading)
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from qlora_pl.inference.source import ModelChoice
    from qlora_pl.merging.merge import MergeOptions, merge

    folder: Path = given.folder
    output = folder / f"merged-{given.method}"
    header = json.loads((folder / "base/config.json").read_text())
    result: dict[str, Any] = {
        "layers": header["num_hidden_layers"],
        "width": header["hidden_size"],
        "imports_bytes": anonymous_bytes(),
    }
    choice = ModelChoice(adapter=(str(folder / f"adapter-{given.method}"),))
    with watched(result, "merge"):
        merge(
            choice,
            MergeOptions(output=str(output), policy="dequantized", score_tokens=0),
        )
    files = sorted(output.glob("model*.safetensors"))
    result["written_bytes"] = sum(path.stat().st_size for path in files)
    result["largest_file_bytes"] = max(path.stat().st_size for path in files)
    return result


def score_here(given: argparse.Namespace) -> dict[str, Any]:
    """Score the merged folder in this process: the trained model first, then the merged one."""
    import torch

    from qlora_pl.inference.source import ModelChoice, resolve_source
    from qlora_pl.merging.asking import load_merged, load_trained
    from qlora_pl.merging.scored_rows import rows_of_file
    from qlora_pl.merging.scoring import estimate_seconds, score, write_reference
    from qlora_pl.modeling.base.identity import identify_base
    from qlora_pl.modeling.base.prequantized import make_plan
    from qlora_pl.modeling.base.quantization_plan import build_skeleton
    from qlora_pl.modeling.loading.host_memory import release_freed_memory

    folder: Path = given.folder
    choice = ModelChoice(adapter=(str(folder / f"adapter-{given.method}"),))
    source = resolve_source(choice)
    identity = identify_base(source.base, None, None)
    skeleton = build_skeleton(identity.folder)
    plan = make_plan(identity.folder, skeleton, source.quantization)
    rows = rows_of_file(source, skeleton, str(folder / "rows.jsonl"), given.score_tokens)
    result: dict[str, Any] = {"score_tokens": sum(row.num_tokens for row in rows)}
    reference = folder / "reference.npy"
    with watched(result, "pack_and_load"):
        trained = load_trained(source, identity, plan, choice)
    with watched(result, "ask_trained"), trained.answering_as("adapter") as model:
        result["foretold_seconds"] = round(estimate_seconds(model, rows), 1)
        write_reference(model, rows, reference)
    del trained, model
    release_freed_memory(of_cycles=True)  # as the command does
    with watched(result, "ask_merged"):
        merged = load_merged(folder / f"merged-{given.method}", torch.bfloat16, torch.device("cpu"))
        found = score(merged, rows, reference)
    return result | {"kl_divergence": found.kl_divergence}


# -- what is lost ----------------------------------------------------------------------------------


def loss(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The scores of both policies in each type, in 16 and 32 bits and packed again."""
    from qlora_pl.inference.source import ModelChoice
    from qlora_pl.merging.merge import MergeOptions, merge

    choice = ModelChoice(adapter=(given.adapter,))
    found = []
    for way in (WAYS[name] for name in given.ways):
        with tempfile.TemporaryDirectory() as temporary:
            output = Path(temporary) / "merged"
            merge(choice, MergeOptions(output=str(output), force=True, data=given.data, **way))
            record = json.loads((output / "merge.json").read_text())
        for policy, scores in record["scores"].items():
            found.append({"adapter": given.name, "policy": policy, **way, **scores})
    return found


if __name__ == "__main__":
    main()
