"""A base with adapters, of which no device ever holds more than its part and one layer.

The first process of a machine quantises the base once, into the packed copy on disk; every process
then builds the model without weights, attaches adapters, and fills and cuts it layer by layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.late_start import LateStarts
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.base_checksum import BaseWatch
from qlora_pl.modeling.base.identity import BaseIdentity
from qlora_pl.modeling.base.quantization import QuantizationConfig, resolve_compute_dtype
from qlora_pl.modeling.base.quantization_plan import AttentionKernel, QuantizationPlan, kernel_name
from qlora_pl.modeling.base.verification import account_for
from qlora_pl.modeling.loading.base_loading import (
    LoadedBase,
    bitsandbytes_config,
    keep_gradients_on_cpu,
    unquantized_dtype,
)
from qlora_pl.modeling.loading.copy_making import packed_copy
from qlora_pl.modeling.loading.host_memory import large_blocks_apart, release_freed_memory
from qlora_pl.modeling.loading.packed_cache import read_packed
from qlora_pl.modeling.loading.packed_model import (
    NamedTensors,
    empty_model,
    fill,
    name_in_base,
    refuse_empty,
)
from qlora_pl.modeling.loading.replacement import planned_replacement
from qlora_pl.modeling.sharding import shard, unit_names

CUT = "while it was cut over the devices"


def refuse_unshardable(
    config: QuantizationConfig, lora: LoRAConfig, grows_vocabulary: bool
) -> None:
    """What needs whole matrices, or another layout of their bytes, cannot be cut over devices.

    Raises:
        ConfigurationError: with every such setting and what works instead.
    """
    settings = {
        "model.quantization.quant_type: int8": config.quant_type == "int8",
        f"model.quantization.storage_dtype: {config.storage_dtype}": config.is_four_bits
        and config.storage_dtype != "uint8",  # bytes that are cast on the way are spoilt
        "model.quantization.compute_dtype: float16": config.compute_dtype == "float16",
        f"model.lora.method: {lora.method}": lora.method != "lora",
        f"model.lora.init: {lora.init}": lora.has_adapters
        and lora.init not in ("kaiming", "gaussian"),
        f"model.lora.bias: {lora.bias}": lora.bias != "none",
        "model.lora.trainable_tokens": bool(lora.trainable_tokens),
        "model.grow_vocabulary: true": grows_vocabulary,
    }
    instead = (
        "uint8 bytes of nf4 or fp4 (or quant_type: none), bfloat16 or float32 products, and LoRA "
        "of method lora, init kaiming or gaussian, without biases, do"
    )
    if problems := [
        f"trainer.strategy: {setting} does not work with fsdp2; {instead}, and ddp takes all."
        for setting, is_set in settings.items()
        if is_set
    ]:
        raise ConfigurationError(problems)


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How processes hold one base between them."""

    mesh: Any
    """Of all devices, one-dimensional."""
    device: torch.device
    """This process's."""
    offload: bool
    """Whether parts wait in host memory; see ``shard``."""
    makes_copy: bool
    """Whether this process is the first of its machine, which quantises."""
    barrier: Callable[[], None]
    """Waits for every process."""


@large_blocks_apart()
def load_sharded(
    identity: BaseIdentity,
    config: QuantizationConfig,
    plan: QuantizationPlan,
    lora: LoRAConfig,
    *,
    sharing: Sharing,
    watch: BaseWatch,
    seed: int,
    cache_dir: str | None = None,
    attn_implementation: AttentionKernel = "auto",
    trust_remote_code: bool = False,
) -> tuple[LoadedBase, nn.Module]:
    """Load, adapt and cut a base; every process calls this together.

    Args:
        identity: What to load.
        config: How it is quantised.
        plan: From ``make_plan``.
        lora: What to attach.
        sharing: Between whom, and how.
        watch: Told what the base is before it is cut, and asked whether it is the same after.
        seed: Of the adapters' start.
        cache_dir: See ``cache_root``.
        attn_implementation: See ``QLoRAModule``.
        trust_remote_code: Whether Python code in the model's folder may run.

    Returns:
        The base, and the adapted model around it.

    Raises:
        ConfigurationError: if a matrix is missing, or was not quantised as planned.
        HardwareError: if there is no room for the packed copy.
        TrainingStoppedError: if cutting it has changed the base.
    """
    device = sharing.device
    compute_dtype = resolve_compute_dtype(config.compute_dtype, device)
    dtype = unquantized_dtype(config, compute_dtype)
    copy, is_made = packed_copy(
        identity,
        config,
        plan,
        device,
        cache_dir,
        attn_implementation,
        trust_remote_code,
        may_make=sharing.makes_copy,
    )
    if is_made:
        release_freed_memory(of_cycles=True)
    sharing.barrier()
    packing = bitsandbytes_config(config, compute_dtype, plan) if config.is_quantized else None
    with planned_replacement(plan, config, compute_dtype):
        base = empty_model(
            identity.folder, packing, dtype, kernel_name(attn_implementation), trust_remote_code
        )
    keep_gradients_on_cpu(base)
    base.requires_grad_(False)
    starts = LateStarts()
    model = attach_adapters(base, lora, seed, starts=starts)
    source: Any = "quantised now" if is_made else "read from the cache"
    loaded = LoadedBase(base, plan, compute_dtype, dtype, source)
    _fill_and_cut(loaded, model, read_packed(copy), starts, config, sharing, watch)
    release_freed_memory(of_cycles=True)
    sharing.barrier()
    if is_made and not config.cache:
        shutil.rmtree(copy, ignore_errors=True)
    return loaded, model


def _fill_and_cut(
    base: LoadedBase,
    model: nn.Module,
    tensors: NamedTensors,
    starts: LateStarts,
    config: QuantizationConfig,
    sharing: Sharing,
    watch: BaseWatch,
) -> None:
    """Give a model its weights, unit by unit, each of which is cut before the next one comes."""
    device = sharing.device
    for unit in unit_names(model):
        fill(model, tensors, device, name_in_base, unit)
        starts.draw(model.get_submodule(unit))
        account_for(base.model, base.plan, config, within=name_in_base(unit))
        watch.remember(model.get_submodule(unit), device, within=name_in_base(unit))
        shard(model.get_submodule(unit), sharing.mesh, sharing.offload)
    fill(model, tensors, device, name_in_base)
    starts.draw(model)
    refuse_empty(model)
    watch.remember_rest(model, device)
    shard(base.model, sharing.mesh, sharing.offload)
    watch.check(model, device, CUT)
