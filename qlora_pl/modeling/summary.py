"""What was loaded and what trains, in a few lines at the start of a run."""

from __future__ import annotations

from torch import nn

from qlora_pl.modeling.loading import LoadedBase
from qlora_pl.modeling.parameters import count_parameters
from qlora_pl.modeling.quantization import QuantizationConfig
from qlora_pl.modeling.verification import wanted_kind


def summarize(
    name: str, model: nn.Module, base: LoadedBase, quantization: QuantizationConfig
) -> str:
    """Weights by type, what trains, and what became of the quantisation.

    Args:
        name: The base's, as the user wrote it.
        model: The base with its adapters.
        base: As it was loaded.
        quantization: As it was asked for.
    """
    counts = count_parameters(model)
    kinds = ", ".join(f"{number:,} in {dtype}" for dtype, number in counts.by_dtype.items())
    share = counts.trainable / counts.total
    lines = [
        f"{name}: {counts.total:,} weights ({kinds}), {counts.stored_bytes / 2**30:.2f} GiB",
        f"trainable: {counts.trainable:,} ({share:.3%}), "
        f"multiplied in {str(base.compute_dtype).split('.')[-1]}",
    ]
    if quantization.is_quantized:
        kind = ", ".join(wanted_kind(quantization))
        lines.append(f"{len(base.plan.quantized)} matrices in {kind}; {base.source}")
        kept = base.plan.kept.items()
        named = ("linear", "experts", "other")
        if skipped := [matrix for matrix, role in kept if role in named]:
            more = f" and {len(skipped) - 8} more" if len(skipped) > 8 else ""
            lines.append(f"not quantised: {', '.join(skipped[:8])}{more}")
    return "\n".join(lines)
