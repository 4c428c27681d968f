"""From the flags of ``inspect adapter`` to its numbers."""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from qlora_pl import __version__
from qlora_pl.inspection.adapters.beside_base import BaseBeside, base_at_hand
from qlora_pl.inspection.adapters.command import AdapterOptions
from qlora_pl.inspection.adapters.matrices import Adapter, read_adapter
from qlora_pl.inspection.adapters.numbers import (
    AdapterNumbers,
    damage,
    findings,
    likeness,
    pair_numbers,
)

SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")


def report(options: AdapterOptions) -> AdapterNumbers:
    """Measure an adapter.

    Raises:
        QLoRAError: if it or its base cannot be read, or they are not of each other.
    """
    adapter = read_adapter(str(options.adapter), "--adapter")
    against = None if options.against is None else read_adapter(options.against, "--against")
    folder, without = base_at_hand(adapter, options.base)
    beside = None
    if folder is not None:
        beside = BaseBeside(adapter, folder, options.cache_dir, options.trust_remote_code)
    bar = tqdm(adapter.pairs.values(), "modules", leave=False)
    pairs = [pair_numbers(pair, beside) for pair in bar]
    alike, notes = (None, []) if against is None else likeness(adapter, against)
    return AdapterNumbers(
        adapter=adapter.name,
        version=__version__,
        base=adapter.base,
        config={key: adapter.config.get(key) for key in SETTINGS},
        step=None if adapter.manifest is None else adapter.manifest.step,
        pairs=pairs,
        biases={
            name: float(bias.double().norm()) if beside is None else beside.bias_change(name, bias)
            for name, bias in adapter.biases.items()
        },
        are_biases_changes=beside is not None,
        others={name: float(tensor.double().norm()) for name, tensor in adapter.others.items()},
        likeness=alike,
        notes=[
            *([without] if without else []),
            *_base_notes(adapter, folder),
            *_dora_notes(adapter, beside),
            *notes,
        ],
        findings=findings(pairs),
        damage=damage(pairs),
    )


def _base_notes(adapter: Adapter, folder: Path | None) -> list[str]:
    if folder is None or adapter.weights is not None:
        return []
    return [
        f"No file says over which weights it was trained; shares are right if '{folder}' holds "
        "those."
    ]


def _dora_notes(adapter: Adapter, beside: BaseBeside | None) -> list[str]:
    if not adapter.config.get("use_dora"):
        return []
    if beside is None:
        return [
            "This is a DoRA, which gives rows other lengths as well; norms and ranks are of B A "
            "alone."
        ]
    told = "Norms and ranks are of B A alone; shares are of the whole change, lengths included"
    if adapter.manifest is None:
        told += ", from the base in 16 bits, as no file says how it was quantised in training"
    return [f"This is a DoRA. {told}."]
