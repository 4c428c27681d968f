"""A base on disk -> its packed copy, matrix by matrix, on a host that need not hold either.

A strategy that cuts the base over devices reads it from there. A 70B is 38 GB packed: more than the
memory beside two 24 GB cards often is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_pl.errors import HardwareError, TrainingStoppedError
from qlora_pl.modeling.base.identity import BaseIdentity
from qlora_pl.modeling.base.prequantized import is_prequantized
from qlora_pl.modeling.base.quantization import (
    QuantizationConfig,
    packed_bytes,
    resolve_compute_dtype,
)
from qlora_pl.modeling.base.quantization_plan import (
    AttentionKernel,
    QuantizationPlan,
    build_skeleton,
    kernel_name,
)
from qlora_pl.modeling.base.verification import account_for
from qlora_pl.modeling.loading.base_loading import (
    bitsandbytes_config,
    cast_unquantized,
    from_pretrained,
    unquantized_dtype,
)
from qlora_pl.modeling.loading.packed_cache import (
    CopyFailed,
    new_copy,
    packed_folder,
    verify_packed,
)
from qlora_pl.modeling.loading.replacement import planned_replacement


def packed_copy(
    identity: BaseIdentity,
    config: QuantizationConfig,
    plan: QuantizationPlan,
    device: torch.device,
    cache_dir: str | None = None,
    attn_implementation: AttentionKernel = "auto",
    trust_remote_code: bool = False,
    may_make: bool = True,
) -> tuple[Path, bool]:
    """Where the packed copy of a base lies, which is made if there is none that is whole.

    Args:
        identity: What is packed.
        config: How.
        plan: From ``make_plan``.
        device: Whose rounding the copy has.
        cache_dir: See ``cache_root``.
        attn_implementation: See ``QLoRAModule``.
        trust_remote_code: Whether Python code in the model's folder may run.
        may_make: False where another process makes it.

    Returns:
        Its folder, and whether it was made now.

    Raises:
        ConfigurationError: if a matrix is missing, or was not quantised as planned.
        HardwareError: if the copy cannot be written.
    """
    dtype = unquantized_dtype(config, resolve_compute_dtype(config.compute_dtype, device))
    folder = packed_folder(identity, config, dtype, device, cache_dir)
    is_made = may_make and not verify_packed(folder)
    if is_made:
        make_copy(identity, config, plan, folder, device, attn_implementation, trust_remote_code)
    return folder, is_made


def make_copy(
    identity: BaseIdentity,
    config: QuantizationConfig,
    plan: QuantizationPlan,
    folder: Path,
    device: torch.device,
    attn_implementation: AttentionKernel = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Write the packed copy of a base that no device may be able to hold.

    Matrices are quantised one by one on the device, whose rounding the copy is to have, and
    written as they come, so that the host need not hold the base either.

    Raises:
        ConfigurationError: if a matrix is missing, or was not quantised as planned.
        HardwareError: if the copy cannot be written.
    """
    from safetensors import SafetensorError

    compute_dtype = resolve_compute_dtype(config.compute_dtype, device)
    dtype = unquantized_dtype(config, compute_dtype)
    is_packed = is_prequantized(identity.folder)
    arguments: dict[str, Any] = {
        "device_map": {"": "cpu"},
        "dtype": dtype,
        "attn_implementation": kernel_name(attn_implementation),
        "trust_remote_code": trust_remote_code,
    }
    if config.is_quantized and not is_packed:
        arguments["quantization_config"] = bitsandbytes_config(config, compute_dtype, plan)
    skeleton = build_skeleton(identity.folder, attn_implementation, trust_remote_code)
    try:
        with new_copy(folder, _copy_bytes(skeleton, config, plan, dtype)) as copy:
            with planned_replacement(plan, config, compute_dtype, device, copy.put_away):
                model = from_pretrained(identity.folder, arguments)
            if is_packed:
                cast_unquantized(model, plan, dtype)
            account_for(model, plan, config)
            copy.add_rest(model)
    except (OSError, SafetensorError, TrainingStoppedError, CopyFailed) as error:
        raise HardwareError(
            "A sharded base is read from its packed copy, which could not be kept in "
            f"'{folder.parent}' ({error}); make room there, or set model.cache_dir."
        ) from error


def _copy_bytes(
    skeleton: nn.Module, config: QuantizationConfig, plan: QuantizationPlan, dtype: torch.dtype
) -> float:
    """What a packed copy takes on disk."""
    return sum(
        packed_bytes(parameter.numel(), config)
        if config.is_quantized and name in plan.quantized
        else float(parameter.numel() * dtype.itemsize)
        for name, parameter in skeleton.named_parameters()
    )
