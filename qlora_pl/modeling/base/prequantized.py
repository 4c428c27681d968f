"""A checkpoint that is quantised already: what it holds, held against what the run asks for.

Such a folder is loaded as it is; quantising it again, or to something else, would add an error that
nobody asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.identity import safetensors_header, weight_files
from qlora_pl.modeling.base.names import matches
from qlora_pl.modeling.base.quantization import (
    COMPUTE_DTYPES,
    INT8_OUTLIER_THRESHOLD,
    QuantizationConfig,
)
from qlora_pl.modeling.base.quantization_plan import (
    QuantizationPlan,
    fragile_linears,
    plan_quantization,
    refuse_unmatched,
    replaced_classes,
)
from qlora_pl.modeling.base.structure import head_name, matrices

STATE = ".quant_state.bitsandbytes__"
"""bitsandbytes keeps a 4-bit weight's kind and block size in a tensor of this name."""
STORAGE_NAMES = {"U8": "uint8", "BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def is_prequantized(folder: Path) -> bool:
    """Whether a model folder says that its weights are quantised already."""
    return _settings(folder) is not None


def stored_quantization(folder: Path) -> QuantizationConfig | None:
    """How bitsandbytes quantised a folder's weights, as its config.json says; None: it did not."""
    settings = _settings(folder) if (folder / "config.json").is_file() else None
    if settings is None or settings.get("quant_method") != "bitsandbytes":
        return None
    if settings.get("load_in_8bit"):
        return QuantizationConfig(quant_type="int8")
    compute_dtype = settings.get("bnb_4bit_compute_dtype")
    return QuantizationConfig(
        quant_type=settings.get("bnb_4bit_quant_type", "fp4"),  # bitsandbytes' own default
        double_quant=bool(settings.get("bnb_4bit_use_double_quant")),
        compute_dtype=compute_dtype if compute_dtype in COMPUTE_DTYPES else "auto",
        storage_dtype=settings.get("bnb_4bit_quant_storage") or "uint8",
    )


def make_plan(folder: Path, skeleton: nn.Module, config: QuantizationConfig) -> QuantizationPlan:
    """What becomes of every weight matrix: from the structure, or from what is quantised already.

    Args:
        folder: The base's.
        skeleton: See ``build_skeleton``.
        config: What is asked for.

    Raises:
        ConfigurationError: naming what cannot be done, or what the checkpoint holds instead.
    """
    settings = _settings(folder)
    if settings is None:
        return plan_quantization(skeleton, config)
    method = settings.get("quant_method", "another program")
    if method != "bitsandbytes":
        raise ConfigurationError(
            f"model.model_name_or_path: '{folder}' is quantised by {method}, and only what "
            "bitsandbytes quantised can be read; name the model in 16 bits."
        )
    files = weight_files(folder)
    if any(path.suffix == ".bin" for path in files):
        raise ConfigurationError(
            f"model.model_name_or_path: '{folder}' keeps its quantised weights pickled (.bin), "
            "which cannot be looked into; name the model in 16 bits."
        )
    tensors = {
        name: (path, offset, entry)
        for path in files
        for header, offset in [safetensors_header(path)]
        for name, entry in header.items()
    }
    states = {name.partition(STATE)[0]: name for name in tensors if STATE in name}
    quantized, held = {}, set()
    for name, parameter, _ in matrices(skeleton):
        if (found := _held(name, tensors, states)) is not None:
            quantized[name] = tuple(parameter.shape)
            held.add(tuple(found.items()))
            _refuse_incomplete(folder, name, found, tensors)
    for found in map(dict, sorted(held)):
        _refuse_other(folder, found, config)
    if not quantized:
        raise ConfigurationError(
            f"model.model_name_or_path: '{folder}' says that it is quantised, but holds no codes "
            "under the names of its weights; fetch it again, or name the model in 16 bits."
        )
    _refuse_other_threshold(folder, settings, config)
    kept = {name: role for name, _, role in matrices(skeleton) if name not in quantized}
    refuse_unmatched(config.skip_modules, [*quantized, *kept])
    _refuse_skipped(quantized, config)
    return QuantizationPlan(
        quantized,
        kept,
        head_name(skeleton),
        fragile_linears(skeleton, kept),
        replaced_classes(skeleton, quantized),
    )


def _settings(folder: Path) -> dict[str, Any] | None:
    settings: dict[str, Any] | None = json.loads((folder / "config.json").read_text()).get(
        "quantization_config"
    )
    return settings


def _held(
    name: str, tensors: dict[str, tuple[Path, int, Any]], states: dict[str, str]
) -> dict[str, Any] | None:
    """How a tensor of the checkpoint is quantised, in this project's keys; None: it is not."""
    stored = tensors[name][2]["dtype"] if name in tensors else "absent"
    if f"{name.removesuffix('weight')}SCB" in tensors or stored == "I8":
        return {"quant_type": "int8"}
    if name not in states:
        return None
    path, offset, entry = tensors[states[name]]
    begin, end = entry["data_offsets"]
    with path.open("rb") as file:
        file.seek(offset + begin)
        recorded = json.loads(file.read(end - begin))
    return {
        "quant_type": recorded["quant_type"],
        "double_quant": f"{name}.nested_absmax" in tensors,
        "block_size": recorded["blocksize"],
        "storage_dtype": STORAGE_NAMES.get(stored, stored),
    }


def _refuse_incomplete(
    folder: Path, name: str, found: dict[str, Any], tensors: dict[str, tuple[Path, int, Any]]
) -> None:
    """Codes without their scales, or the other way round, decode to nothing."""
    needed = [name, f"{name}.absmax", f"{name}.quant_map"]
    if found["quant_type"] == "int8":
        needed = [name, f"{name.removesuffix('weight')}SCB"]
    elif found["double_quant"]:
        needed.append(f"{name}.nested_quant_map")
    if missing := [tensor for tensor in needed if tensor not in tensors]:
        raise ConfigurationError(
            f"model.model_name_or_path: '{folder}' lacks '{missing[0]}', without which a quantised "
            "matrix cannot be read; fetch it again."
        )


def _refuse_other_threshold(
    folder: Path, settings: dict[str, Any], config: QuantizationConfig
) -> None:
    threshold = settings.get("llm_int8_threshold", INT8_OUTLIER_THRESHOLD)
    if config.quant_type == "int8" and threshold != INT8_OUTLIER_THRESHOLD:
        raise ConfigurationError(
            f"model.model_name_or_path: '{folder}' is to be multiplied with an llm_int8_threshold "
            f"of {threshold}, and here it is always {INT8_OUTLIER_THRESHOLD}; name the model in 16 "
            "bits."
        )


def _refuse_other(folder: Path, found: dict[str, Any], config: QuantizationConfig) -> None:
    asked = {
        "quant_type": config.quant_type,
        "double_quant": config.uses_double_quant,
        "block_size": config.block_size,
        "storage_dtype": config.storage_dtype,
    }
    if different := {key: value for key, value in found.items() if asked[key] != value}:
        text = ", ".join(f"{key}: {str(value).lower()}" for key, value in different.items())
        raise ConfigurationError(
            f"model.quantization: '{folder}' is quantised already, with {text}; set the same, or "
            "name the model in 16 bits."
        )


def _refuse_skipped(quantized: dict[str, Any], config: QuantizationConfig) -> None:
    for name in quantized:
        if matches(name.rpartition(".")[0], config.skip_modules):
            raise ConfigurationError(
                f"model.quantization.skip_modules: '{name}' is quantised in the checkpoint already;"
                " name the model in 16 bits to keep it unquantised."
            )
