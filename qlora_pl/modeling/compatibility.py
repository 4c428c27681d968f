"""What a checkpoint may be continued by: each difference between two runs as one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from qlora_pl.errors import CheckpointError


def describe_run(module: Any) -> dict[str, dict[str, Any]]:
    """What a checkpoint of a ``QLoRAModule`` can be continued by, in plain types."""
    identity, quantization, base = module.identity, module.quantization, module.base
    lora = {key: value for key, value in asdict(module.lora).items() if key != "init_from"}
    return {
        "base": {
            "name": identity.name,
            "weights": identity.weights,
            "config": identity.config,
        },
        "quantization": {
            "quant_type": quantization.quant_type,
            "double_quant": quantization.uses_double_quant,
            "block_size": quantization.block_size,
            "skip_modules": list(quantization.skip_modules),
            "compute_dtype": str(base.compute_dtype).split(".")[-1],
            "unquantized_dtype": str(base.unquantized_dtype).split(".")[-1],
            "replaced_classes": list(base.plan.replaced_classes),
        },
        "lora": lora if module.lora.has_adapters else {"method": "none", "dtype": lora["dtype"]},
        "optimizer": asdict(module.optimizer_config),
        "schedule": asdict(module.schedule_config),
        "loss": {"normalize_loss_by": module.normalize_loss_by},
    }


SHAPING_KEYS = (
    "method",
    "r",
    "alpha",
    "use_rslora",
    "bias",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
)
"""What of an adapter's settings matters when it is only used."""


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], is_training: bool
) -> Iterator[str]:
    """One sentence for each value that a checkpoint and this run do not share."""
    if saved["base"]["weights"] != now["base"]["weights"]:
        yield (
            f"The checkpoint's base '{saved['base']['name']}' has other weights than "
            f"'{now['base']['name']}' (fingerprints {saved['base']['weights'][:12]} and "
            f"{now['base']['weights'][:12]}). Name the base it was trained on."
        )
    elif saved["base"]["config"] != now["base"]["config"]:
        yield (
            f"The base '{now['base']['name']}' has the checkpoint's weights, but its config.json "
            "says another computation. Use the configuration it was trained with."
        )
    for group, values in now.items():
        for key, value in values.items() if group != "base" else ():
            matters = is_training or group == "quantization" or key in SHAPING_KEYS
            if matters and not _same(saved[group].get(key), value):
                name = key if group == "loss" else f"{group}.{key}"
                yield (
                    f"The checkpoint was trained with model.{name}={saved[group].get(key)}, this "
                    f"run has {value}. Use the checkpoint's value, or start without --ckpt_path."
                )


def _same(saved: Any, now: Any) -> bool:
    # Of several patterns that fit a module the first counts, so their order matters.
    return bool(saved == now) and (not isinstance(now, dict) or list(saved) == list(now))


def refuse_other_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Saved tensors must have exactly the names and shapes of the module's.

    Raises:
        CheckpointError: naming what differs.
    """
    problems = [f"lacks '{name}'" for name in own if name not in saved]
    problems += [f"has an unknown '{name}'" for name in saved if name not in own]
    problems += [
        f"has '{name}' of shape {tuple(saved[name].shape)}, not {tuple(parameter.shape)}"
        for name, parameter in own.items()
        if name in saved and saved[name].shape != parameter.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"The checkpoint {problems[0]}{more}.")
