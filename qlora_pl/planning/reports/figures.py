"""The pictures of docs/memory.md: the paper's figure 6 as the plan has it, and how plans grow.

qlora-pl plan --figure6 docs/memory-figure6.png
python -m qlora_pl.planning.reports.figures docs      both pictures, and their numbers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qlora_pl.planning.advice.published import CLAIM, FIGURES
from qlora_pl.planning.memory.memory_plan import COMPONENTS, MemoryPlan, plan_memory
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.reports.alternatives import as_full_fine_tuning, as_lora
from qlora_pl.planning.reports.pictures import Bar, Curve, Panel, draw_curves, draw_panels
from qlora_pl.planning.shapes.known_shapes import known_shape
from qlora_pl.planning.shapes.model_shape import shape_from_config

GB = 1e9
SIZES = {"7B": "llama-7b", "13B": "llama-13b", "33B": "llama-33b", "65B": "llama-65b"}
LINES = {"24 GB": 24 * GB, "48 GB": 48 * GB}
QLORA = TrainingSetting(adapter_dtype="bfloat16", tokens_per_row=512, has_mask=False)
"""The paper's setting: batch 1, length 512, r 64 on all linear modules, gradient checkpointing."""
METHODS = {
    "QLoRA": QLORA,
    "16-bit LoRA": as_lora(QLORA),
    "full fine-tuning": as_full_fine_tuning(QLORA),
}
GROUPS = {
    "packed weights": "4-bit weights",
    "constants of the quantisation": "4-bit weights",
    "embeddings and head": "16-bit weights",
    "norms, biases and unquantised matrices": "16-bit weights",
    "adapters": "adapters and gradients",
    "gradients": "adapters and gradients",
    "optimizer state": "optimizer state",
    "optimizer state that can be paged": "optimizer state",
    "activations": "activations, logits, buffers",
    "logits and loss": "activations, logits, buffers",
    "dequantised matrix": "activations, logits, buffers",
    "gathered layers and sums": "activations, logits, buffers",
    "CUDA context and fragmentation": "CUDA context, fragmentation",
}
"""What is drawn in one colour."""


def plan_of(size: str, method: str) -> MemoryPlan:
    """The plan of one bar: LLaMA of a size (``7B``), trained by a method of ``METHODS``."""
    return plan_memory(shape_from_config(known_shape(SIZES[size])), METHODS[method])


def reduction(size: str, method: str) -> float:
    """Share of a method's memory that QLoRA does without, before the allocator's overhead."""
    ours, other = plan_of(size, "QLoRA"), plan_of(size, method)
    return 1 - ours.before_overhead / other.before_overhead


def grouped(plan: MemoryPlan) -> dict[str, int]:
    """A plan's components as they are drawn."""
    parts: dict[str, int] = dict.fromkeys(GROUPS.values(), 0)
    for name, size in plan.components.items():
        parts[GROUPS[COMPONENTS[name]]] += size
    return parts


def draw_figure6(file: Path) -> str:
    """Draw QLoRA alone, component by component, and beside 16-bit LoRA and full fine-tuning.

    Returns:
        The numbers, as a table.
    """
    bars = {
        size: [Bar(label=method, components=grouped(plan_of(size, method))) for method in METHODS]
        for size in SIZES
    }
    alone = Panel(
        title="QLoRA (NF4, double quantisation, r 64, batch 1 x 512)",
        groups={f"LLaMA {size}": its[:1] for size, its in bars.items()},
        lines=LINES,
        marks={
            f"LLaMA {size}": paper.figure6_gb * GB
            for size, paper in zip(SIZES, FIGURES.values(), strict=True)
        },
    )
    together = Panel(
        title="the same, with 16-bit LoRA and full fine-tuning in 16 bits",
        groups={f"LLaMA {size}": its for size, its in bars.items()},
        lines={},
        shows_components=False,
    )
    draw_panels(file, [alone, together], "What training takes of a GPU's memory", "--figure6")
    return figure6_table()


def figure6_table() -> str:
    """The numbers of the figure, the paper's beside them."""
    lines = [
        f"{'GB before overhead':20}{'QLoRA':>8}{'paper':>8}{'16-bit LoRA':>13}{'less':>6}"
        f"{'full':>9}{'less':>7}"
    ]
    for (size, _), paper in zip(SIZES.items(), FIGURES.values(), strict=True):
        sums = [plan_of(size, method).before_overhead / GB for method in METHODS]
        lines.append(
            f"{f'LLaMA {size}':20}{sums[0]:>8.1f}{paper.figure6_gb:>8.1f}{sums[1]:>13.1f}"
            f"{reduction(size, '16-bit LoRA'):>6.0%}{sums[2]:>9.1f}"
            f"{reduction(size, 'full fine-tuning'):>7.1%}"
        )
    return "\n".join([*lines, f"The paper claims {CLAIM}."])


def draw_growth(file: Path) -> None:
    """Draw how the plan of a 7B and a 65B grows with length, rank, batch and devices."""

    def curve(label: str, size: str, steps: Sequence[int], change: Change) -> Curve:
        shape = shape_from_config(known_shape(SIZES[size]))
        totals = [plan_memory(shape, change(step)).total for step in steps]
        return Curve(label=label, x=steps, y=totals)

    lengths, ranks = (512, 1024, 2048, 4096, 8192), (8, 16, 32, 64, 128, 256)
    batches, devices = (1, 2, 4, 8, 16), (1, 2, 4, 8)
    kept = replace(QLORA, gradient_checkpointing=False)
    wide = replace(QLORA, adapter_dtype="float32")

    def kept_rows(number: int) -> TrainingSetting:
        return replace(kept, tokens_per_row=number)

    draw_curves(
        file,
        "How a plan grows (LLaMA, NF4, r 64, 1 x 512 tokens, one GPU, unless varied)",
        {
            "tokens of a row": [
                curve("7B", "7B", lengths, lambda n: replace(QLORA, tokens_per_row=n)),
                curve(
                    "7B, nothing recomputed",
                    "7B",
                    lengths,
                    kept_rows,
                ),
                curve("65B", "65B", lengths, lambda n: replace(QLORA, tokens_per_row=n)),
            ],
            "rank": [
                curve("7B", "7B", ranks, lambda n: replace(QLORA, r=n)),
                curve("7B, float32 adapters", "7B", ranks, lambda n: replace(wide, r=n)),
                curve("65B", "65B", ranks, lambda n: replace(QLORA, r=n)),
            ],
            "rows of a micro-batch": [
                curve("7B", "7B", batches, lambda n: replace(QLORA, batch_size=n)),
                curve(
                    "7B, nothing recomputed", "7B", batches, lambda n: replace(kept, batch_size=n)
                ),
                curve("65B", "65B", batches, lambda n: replace(QLORA, batch_size=n)),
            ],
            "GPUs": [
                curve("65B, ddp", "65B", devices, lambda n: _on(n, "ddp")),
                curve("65B, fsdp2", "65B", devices, lambda n: _on(n, "fsdp2")),
                curve("33B, fsdp2", "33B", devices, lambda n: _on(n, "fsdp2")),
            ],
        },
    )


Change = Callable[[int], TrainingSetting]


def _on(number: int, strategy: str) -> TrainingSetting:
    name = strategy if number > 1 else "one"
    return replace(QLORA, num_devices=number, strategy=name)  # type: ignore[arg-type]
