"""What each kind of base costs and loses: weight error, validation loss, seconds a step.

    python benchmarks/kinds.py --base .cache/quickstart/SmolLM2-135M-Instruct [--steps 4]

Loads the quickstart's base in each kind, scores the quickstart's validation rows before any
training, and times training steps of 8 rows. All in one process, so that ratios mean something.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.prequantized import make_plan
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.loading.base_loading import LoadedBase, load_base, prepare_for_training
from qlora_pl.modeling.parameters import int8_scales
from qlora_pl.modeling.steps.loss import causal_lm_loss

ROWS = Path(__file__).parent.parent / "experiments" / "quickstart"
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"quant_type": "none", "compute_dtype": "float32"},
    "bfloat16": {"quant_type": "none", "compute_dtype": "bfloat16"},
    "int8": {"quant_type": "int8", "compute_dtype": "bfloat16"},
    "nf4": {"quant_type": "nf4", "double_quant": False, "compute_dtype": "bfloat16"},
    "nf4 + double": {"quant_type": "nf4", "compute_dtype": "bfloat16"},
    "nf4 + double, float32 products": {"quant_type": "nf4", "compute_dtype": "float32"},
    "fp4": {"quant_type": "fp4", "double_quant": False, "compute_dtype": "bfloat16"},
}


def load(folder: str, settings: dict[str, Any]) -> LoadedBase:
    """A base in one kind, never from a packed copy."""
    config = QuantizationConfig(**settings, cache=False)
    identity = identify_base(folder, None, None)
    plan = make_plan(identity.folder, build_skeleton(identity.folder), config)
    return load_base(identity, config, plan, device=torch.device("cpu"))


def weight_error(base: LoadedBase, reference: LoadedBase) -> float:
    """Norm of the difference to the unquantised weights, relative to theirs, over all matrices."""
    from bitsandbytes import functional

    difference = total = 0.0
    for name in base.plan.quantized:
        weight: Any = base.model.get_parameter(name)
        exact = reference.model.get_parameter(name).float()
        if hasattr(weight, "quant_state"):
            values = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        else:
            scales: Any = int8_scales(base.model.get_submodule(name.rpartition(".")[0]))
            values = weight.data.float() * scales.view(-1, 1) / 127
        difference += float((values - exact).square().sum())
        total += float(exact.square().sum())
    return float((difference / total) ** 0.5) if total else 0.0


def validation_loss(model: Any, batches: list[Any]) -> float:
    """Nats per trained token."""
    with torch.no_grad():
        losses = [causal_lm_loss(model.eval(), batch) for batch in batches]
    model.train()
    nats = sum(float(loss.token_sum) for loss in losses)
    return nats / sum(int(loss.num_tokens) for loss in losses)


def step_seconds(model: Any, batches: list[Any], count: int) -> list[float]:
    """Forward and backward of so many batches, one warm-up apart."""
    seconds = []
    for batch in batches[: count + 1]:
        started = time.perf_counter()
        loss = causal_lm_loss(model, batch)
        (loss.total / loss.weight).backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def guard_seconds(folder: str, batches: list[Any], is_guarded: bool) -> float:
    """A pass over batches without gradients, with and without bitsandbytes' inference kernel."""
    model: Any = load(folder, KINDS["nf4 + double"]).model.eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = not is_guarded
    validation_loss(model.eval(), batches[:1])  # repacks, where it may
    model.eval()
    started = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            causal_lm_loss(model, batch)
    return time.perf_counter() - started


def main() -> None:
    """Print one line a kind, then what the guard of ``keep_gradients_on_cpu`` costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=".cache/quickstart/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", help=f"some of {', '.join(KINDS)}; all")
    arguments = parser.parse_args()
    data = InstructionDataModule(
        str(ROWS / "train.jsonl"),
        val_sources=str(ROWS / "validation.jsonl"),
        tokenizer=arguments.base,
        max_length=256,
        batch_size=8,
    )
    data.setup("fit")
    training = data.first_batches(arguments.steps + 1)
    validation = list(data.val_dataloader())
    reference = load(arguments.base, KINDS["float32"])
    print("| kind | weight error | validation loss | seconds a step |")
    print("| --- | --- | --- | --- |")
    for name, settings in KINDS.items():
        if arguments.kinds and name not in arguments.kinds:
            continue
        base = load(arguments.base, settings)
        error = weight_error(base, reference)
        model = attach_adapters(base.model, LoRAConfig(r=16), seed=0)
        prepare_for_training(model, gradient_checkpointing=False)
        loss = validation_loss(model, validation)
        seconds = step_seconds(model, training, arguments.steps)
        print(
            f"| {name} | {error:.2%} | {loss:.3f} | {statistics.median(seconds):.2f} "
            f"({min(seconds):.2f} to {max(seconds):.2f}) |",
            flush=True,
        )
    if torch.cpu._is_avx512_bf16_supported():
        with_it, without = (guard_seconds(arguments.base, validation, g) for g in (True, False))
        print(f"a validation pass: {with_it:.2f} s with the guard, {without:.2f} s without")


if __name__ == "__main__":
    main()
