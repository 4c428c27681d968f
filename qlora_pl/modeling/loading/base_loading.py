"""A base on disk -> a frozen, quantised model on one device, every weight matrix accounted for.

transformers quantises tensor by tensor while it reads, so a 65B never exists in 16 bits. What was
loaded is then held against the plan, matrix by matrix, and asked for one row of logits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.modeling.base.encoder_decoder import auto_class, keep_float32_products
from qlora_pl.modeling.base.identity import BaseIdentity, weight_files
from qlora_pl.modeling.base.prequantized import is_prequantized
from qlora_pl.modeling.base.quantization import (
    INT8_OUTLIER_THRESHOLD,
    QuantizationConfig,
    compute_advice,
    resolve_compute_dtype,
)
from qlora_pl.modeling.base.quantization_plan import (
    AttentionKernel,
    QuantizationPlan,
    fragile_modules,
    kernel_name,
)
from qlora_pl.modeling.base.verification import account_for, refuse_broken_forward
from qlora_pl.modeling.loading.host_memory import large_blocks_apart
from qlora_pl.modeling.loading.packed_cache import (
    packed_folder,
    read_packed,
    verify_packed,
    write_packed,
)
from qlora_pl.modeling.loading.packed_model import empty_model, fill, refuse_empty
from qlora_pl.modeling.loading.replacement import planned_replacement

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base on its device."""

    model: nn.Module
    plan: QuantizationPlan
    compute_dtype: torch.dtype
    """Of the matrix products."""
    unquantized_dtype: torch.dtype
    """What the rest (norms, embeddings, head) is kept in."""
    source: Literal[
        "quantised now", "read from the cache", "quantised already", "unquantised", "drawn"
    ]
    """Where its weights come from."""

    @property
    def is_from_cache(self) -> bool:
        """Whether packed weights were read instead of made."""
        return self.source == "read from the cache"


@large_blocks_apart()
def load_base(
    identity: BaseIdentity,
    config: QuantizationConfig,
    plan: QuantizationPlan,
    *,
    device: torch.device,
    cache_dir: str | None = None,
    attn_implementation: AttentionKernel = "auto",
    trust_remote_code: bool = False,
    is_first_rank: bool = True,
    rest_dtype: torch.dtype | None = None,
) -> LoadedBase:
    """Load a base onto a device, quantised as planned; from packed weights if there are any.

    Args:
        identity: What to load; its fingerprint names the packed copy.
        config: How to quantise.
        plan: From ``make_plan``.
        device: Where to.
        cache_dir: See ``cache_root``.
        attn_implementation: See ``QLoRAModule``.
        trust_remote_code: Whether Python code in the model's folder may run.
        is_first_rank: Whether this process is the one that keeps a packed copy.
        rest_dtype: What unquantised weights are kept in; None: see ``unquantized_dtype``.

    Raises:
        ConfigurationError: if a matrix is missing, or was not quantised as planned, or the model
            does not give finite logits.
    """
    compute_dtype = resolve_compute_dtype(config.compute_dtype, device)
    if is_first_rank and (advice := compute_advice(config.compute_dtype, device)) is not None:
        logger.warning("%s", advice)
    rest_dtype = rest_dtype or unquantized_dtype(config, compute_dtype)
    arguments = {
        "device_map": {"": str(device)},
        "dtype": rest_dtype,
        "attn_implementation": kernel_name(attn_implementation),
        "trust_remote_code": trust_remote_code,
    }
    packed = packed_folder(identity, config, rest_dtype, device, cache_dir)
    is_packed = is_prequantized(identity.folder)
    keep_copy = config.is_quantized and config.cache and not is_packed
    if not config.is_quantized:
        model, source = from_pretrained(identity.folder, arguments), "unquantised"
    else:
        with planned_replacement(plan, config, compute_dtype):
            if is_packed:
                model, source = from_pretrained(identity.folder, arguments), "quantised already"
                cast_unquantized(model, plan, rest_dtype)  # transformers keeps the checkpoint's
            elif keep_copy and verify_packed(packed):
                model, source = _from_copy(packed, identity, config, plan, device, arguments)
            else:
                arguments["quantization_config"] = bitsandbytes_config(config, compute_dtype, plan)
                model, source = from_pretrained(identity.folder, arguments), "quantised now"
    account_for(model, plan, config)
    if keep_copy and source == "quantised now" and is_first_rank:
        write_packed(model, packed)
    keep_gradients_on_cpu(model)
    if compute_dtype == torch.float16:
        keep_float32_products(model, plan.fragile)
    model.requires_grad_(False)
    refuse_broken_forward(model, compute_dtype, plan)
    return LoadedBase(model, plan, compute_dtype, rest_dtype, source)  # type: ignore[arg-type]


def _from_copy(
    packed: Path,
    identity: BaseIdentity,
    config: QuantizationConfig,
    plan: QuantizationPlan,
    device: torch.device,
    arguments: dict[str, Any],
) -> tuple[nn.Module, str]:
    model = empty_model(
        identity.folder,
        bitsandbytes_config(config, resolve_compute_dtype(config.compute_dtype, device), plan),
        arguments["dtype"],
        arguments["attn_implementation"],
        arguments["trust_remote_code"],
    )
    fill(model, read_packed(packed), device)
    refuse_empty(model)
    return model, "read from the cache"


def unquantized_dtype(config: QuantizationConfig, compute_dtype: torch.dtype) -> torch.dtype:
    """What weights that are not quantised (norms, embeddings, head) are kept in.

    The type of the products; but float32 beside quantised weights multiplied in float16, whose
    range a residual stream leaves (65,504; autocast then multiplies in float16 what can be).
    """
    is_half = compute_dtype == torch.float16
    return torch.float32 if is_half and config.is_quantized else compute_dtype


def from_pretrained(folder: Path, arguments: dict[str, Any]) -> nn.Module:
    """What transformers loads from a folder with these arguments, complete or refused.

    Raises:
        ConfigurationError: if a weight is missing or damaged.
        HardwareError: if the base does not fit.
    """
    from transformers import AutoConfig  # slow to import

    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=arguments["trust_remote_code"]
        )
        model, info = auto_class(config).from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in ``info``
            **arguments,
        )
    except torch.OutOfMemoryError as error:
        raise HardwareError(
            "The base does not fit into this device's memory while loading; choose a smaller base, "
            "model.quantization.quant_type: nf4 with double_quant, or a larger device."
        ) from error
    except Exception as error:  # of a dozen types, where tensors are damaged or do not fit
        if any(path.suffix == ".bin" for path in weight_files(folder)):
            raise ConfigurationError(
                f"model.model_name_or_path: the pickled weights (.bin) of '{folder}' are damaged, "
                "or hold more than tensors, which is not run here; fetch them again, or take the "
                "model in safetensors."
            ) from error
        raise ConfigurationError(
            f"model.model_name_or_path: transformers cannot load '{folder}' "
            f"({(str(error).strip().splitlines() or [type(error).__name__])[0]})."
        ) from error
    mismatched = [f"{name} in this shape" for name, *_ in info["mismatched_keys"]]
    if missing := sorted([*info["missing_keys"], *mismatched]):
        raise ConfigurationError(
            f"model.model_name_or_path: '{folder}' does not hold {len(missing)} of the weights its "
            f"config.json asks for ({', '.join(missing[:3])}); they would have been random."
        )
    if ignored := sorted(info["unexpected_keys"]):
        logger.warning(
            "'%s' holds %d weights that its config.json does not ask for and that are left out "
            "(%s).",
            folder,
            len(ignored),
            ", ".join(ignored[:3]),
        )
    loaded: nn.Module = model
    return loaded


def cast_unquantized(model: Any, plan: QuantizationPlan, dtype: torch.dtype) -> None:
    """Give what a prequantised checkpoint has in floating point the type it is to have here."""
    fragile = [*fragile_modules(model), *(model._keep_in_fp32_modules_strict or ())]
    for name, parameter in model.named_parameters():
        is_fragile = any(f".{part}." in f".{name}." for part in fragile)
        if name not in plan.quantized and parameter.is_floating_point() and not is_fragile:
            parameter.data = parameter.data.to(dtype)


def bitsandbytes_config(
    config: QuantizationConfig, dtype: torch.dtype, plan: QuantizationPlan
) -> Any:
    """What transformers and PEFT programs call the same quantisation: a ``BitsAndBytesConfig``."""
    from transformers import BitsAndBytesConfig  # slow to import

    # A given list replaces transformers' own, so it must name the head as well.
    kept = plan.kept_modules
    if not config.is_four_bits:
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=INT8_OUTLIER_THRESHOLD,
            llm_int8_skip_modules=kept,
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.uses_double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=getattr(torch, config.storage_dtype),
        llm_int8_skip_modules=kept,
    )


def keep_gradients_on_cpu(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for inference on CPUs with AVX512-BF16.

    One forward without gradients would repack a ``Linear4bit`` in place for a kernel that has no
    backward; training afterwards then goes on without most gradients and without an error
    (bitsandbytes 0.50; Lightning's sanity validation is such a forward).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def prepare_for_training(model: nn.Module, gradient_checkpointing: bool) -> None:
    """Set what transformers leaves at its inference defaults.

    ``from_pretrained`` returns a model in evaluation mode and Lightning never changes that, so
    dropout and gradient checkpointing would be off without a word.

    Raises:
        ConfigurationError: if activations cannot be recomputed in this family.
    """
    cast(Any, model).config.use_cache = False
    if gradient_checkpointing:
        adapted = cast(Any, model)
        base = adapted.get_base_model() if hasattr(model, "get_base_model") else adapted
        if not base.supports_gradient_checkpointing:
            raise ConfigurationError(
                f"model.gradient_checkpointing: transformers cannot recompute the activations of "
                f"this {type(base).__name__}; set it to false."
            )
        # Not reentrant: works without input gradients, and under DDP marks no parameter twice.
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
            model.activation_checkpointing_enable(options)  # type: ignore[operator]
        else:
            model.gradient_checkpointing_enable(options)  # type: ignore[operator]
    model.train()
