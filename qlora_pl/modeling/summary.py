"""What was loaded and what trains, in a few lines at the start of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.verification import wanted_kind
from qlora_pl.modeling.loading.base_loading import LoadedBase
from qlora_pl.modeling.parameters import count_parameters


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
        if fragile := base.plan.fragile:
            lines.append(_spared(base, counts.total))
        kept = base.plan.kept.items()
        named = ("linear", "experts", "other")
        if skipped := [matrix for matrix, role in kept if role in named and matrix not in fragile]:
            more = f" and {len(skipped) - 8} more" if len(skipped) > 8 else ""
            lines.append(f"not quantised: {', '.join(skipped[:8])}{more}")
    return "\n".join(lines)


def _spared(base: LoadedBase, total: int) -> str:
    """How much a family's authors except from quantisation, and what it is kept in."""
    weights: list[Any] = [
        base.model.get_submodule(name.rpartition(".")[0]).weight for name in base.plan.fragile
    ]
    size = sum(weight.numel() for weight in weights)
    names = sorted({name.split(".")[-2] for name in base.plan.fragile})
    dtypes = sorted({str(weight.dtype).split(".")[-1] for weight in weights})
    return (
        f"not quantised, as the family's authors advise, but kept in {', '.join(dtypes)}: "
        f"{', '.join(names)} ({len(weights)} matrices, {size:,} weights, {size / total:.1%})"
    )
