"""A base on disk -> a frozen, quantised model on one device, every weight matrix accounted for.

transformers quantises tensor by tensor while it reads, so a 65B never exists in 16 bits. It also
leaves matrices unquantised without a word (subclasses of ``nn.Linear``, fused experts); so a plan
is made from the model's structure first, and what was loaded is held against it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.modeling.identity import BaseIdentity
from qlora_pl.modeling.packed_cache import packed_folder, verify_packed, write_packed
from qlora_pl.modeling.quantization import QuantizationConfig, resolve_compute_dtype
from qlora_pl.modeling.structure import Role, head_name, matches, matrices

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationPlan:
    """What is to become of every weight matrix of a base."""

    quantized: dict[str, tuple[int, ...]]
    """Parameters to be packed, and their shapes."""
    kept: dict[str, Role]
    """Parameters that stay as they are, and why (``linear``: listed in ``skip_modules``)."""
    head: str | None
    """The output head; a tied one has no parameter of its own but must be left alone as well."""

    @property
    def kept_modules(self) -> list[str]:
        """The modules that transformers must leave alone."""
        modules = [name.rpartition(".")[0] for name in self.kept]
        return modules if self.head in (None, *modules) else [*modules, str(self.head)]


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base on its device."""

    model: nn.Module
    plan: QuantizationPlan
    compute_dtype: torch.dtype
    is_from_cache: bool
    """Whether packed weights were read instead of made."""


def build_skeleton(
    folder: Path, attn_implementation: str = "sdpa", trust_remote_code: bool = False
) -> nn.Module:
    """The model without its weights, on the meta device: names and shapes at no cost.

    Raises:
        ConfigurationError: if transformers knows no such model, or it is not a causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # slow to import

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            skeleton: nn.Module = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # an unknown architecture raises KeyError, ValueError, ImportError
        raise ConfigurationError(
            f"model.model_name_or_path: transformers cannot build a causal language model from "
            f"'{folder}' ({str(error).splitlines()[0] if str(error) else type(error).__name__})."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigurationError(
            f"model.model_name_or_path: '{folder}' is quantised already; name the model in 16 bits."
        )
    return skeleton


def plan_quantization(skeleton: nn.Module, config: QuantizationConfig) -> QuantizationPlan:
    """Decide on every weight matrix from the model's structure.

    Raises:
        ConfigurationError: naming entries of ``skip_modules`` that match nothing.
    """
    quantized: dict[str, tuple[int, ...]] = {}
    kept: dict[str, Role] = {}
    unmatched = set(config.skip_modules)
    for name, parameter, role in matrices(skeleton):
        owner = name.rpartition(".")[0]
        listed = [entry for entry in config.skip_modules if matches(owner, [entry])]
        unmatched -= set(listed)
        if config.is_quantized and role in ("linear", "other") and not listed:
            quantized[name] = tuple(parameter.shape)
        else:
            kept[name] = role
    if unmatched:
        raise ConfigurationError(
            f"model.quantization.skip_modules: no weight matrix belongs to "
            f"{', '.join(sorted(unmatched))}; write a module's name or the last part of it."
        )
    return QuantizationPlan(quantized, kept, head_name(skeleton))


def load_base(
    identity: BaseIdentity,
    config: QuantizationConfig,
    plan: QuantizationPlan,
    *,
    device: torch.device,
    cache_dir: str | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    is_first_rank: bool = True,
) -> LoadedBase:
    """Load a base onto a device, quantised as planned; from packed weights if there are any.

    Args:
        identity: What to load; its fingerprint names the packed copy.
        config: How to quantise.
        plan: From ``plan_quantization``.
        device: Where to.
        cache_dir: See ``cache_root``.
        attn_implementation: transformers' name of an attention kernel.
        trust_remote_code: Whether code in the model's folder may run.
        is_first_rank: Whether this process is the one that keeps a packed copy.

    Raises:
        ConfigurationError: if a matrix is missing, or was not quantised as planned.
    """
    dtype = resolve_compute_dtype(config.compute_dtype, device)
    packed = packed_folder(identity, config, dtype, device, cache_dir)
    keep_copy = config.is_quantized and config.cache
    is_from_cache = keep_copy and verify_packed(packed, cache_dir)
    arguments = {
        "device_map": {"": str(device)},
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
    }
    if is_from_cache:
        model = _from_pretrained(packed, arguments)
    else:
        if config.is_quantized:
            arguments["quantization_config"] = bitsandbytes_config(config, dtype, plan)
        model = _from_pretrained(identity.folder, arguments)
    account_for(model, plan, config)
    if device.type == "cpu":
        refuse_misread_widths(model, plan)
    if keep_copy and not is_from_cache and is_first_rank:
        write_packed(model, packed)
    keep_gradients_on_cpu(model)
    model.requires_grad_(False)
    return LoadedBase(model, plan, dtype, is_from_cache)


def _from_pretrained(folder: Path, arguments: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM  # slow to import

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
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


def bitsandbytes_config(
    config: QuantizationConfig, dtype: torch.dtype, plan: QuantizationPlan
) -> Any:
    """What transformers and PEFT programs call the same quantisation: a ``BitsAndBytesConfig``."""
    from transformers import BitsAndBytesConfig  # slow to import

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=getattr(torch, config.storage_dtype),
        # A given list replaces transformers' own, so it must name the head as well.
        llm_int8_skip_modules=plan.kept_modules,
    )


def account_for(model: nn.Module, plan: QuantizationPlan, config: QuantizationConfig) -> None:
    """Hold what was loaded against the plan, matrix by matrix.

    Raises:
        ConfigurationError: naming the matrices that are not what was asked for.
    """
    wrong = []
    for name, shape in plan.quantized.items():
        weight = model.get_parameter(name)
        state = getattr(weight, "quant_state", None)
        if state is None:
            wrong.append(f"{name} ({str(weight.dtype).split('.')[-1]})")
        elif sorted(state.shape) != sorted(shape):  # sorted: GPT-2's are packed transposed
            raise ConfigurationError(
                f"model.model_name_or_path: '{name}' has the shape {tuple(state.shape)} on disk, "
                f"and config.json asks for {shape}; they are not of the same model."
            )
        elif state.quant_type != config.quant_type or state.nested != config.double_quant:
            wrong.append(f"{name} ({state.quant_type}, double_quant {state.nested})")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigurationError(
            f"model.quantization: {len(wrong)} of {len(plan.quantized)} weight matrices are not "
            f"{config.quant_type} after loading: {', '.join(wrong[:3])}{more}; list them in "
            "model.quantization.skip_modules to keep them as they are."
        )


def refuse_misread_widths(model: nn.Module, plan: QuantizationPlan) -> None:
    """Refuse matrices that bitsandbytes 0.50 decodes wrongly on CPUs with AVX-512.

    Where rows are a multiple of 16 wide but not of 64, its kernel counts the blocks of every row
    from the row's start, so that most weights get the scale of another block: outputs are off by
    20 to 40 % (normal weights, 16 to 208 wide).

    Raises:
        HardwareError: naming the first of them.
    """
    misread = [
        (name, state.shape[-1])
        for name in plan.quantized
        if (state := cast(Any, model.get_parameter(name)).quant_state).shape[-1] % 64
        and state.shape[-1] % 16 == 0
    ]
    if misread:
        name, width = misread[0]
        raise HardwareError(
            f"model.quantization: '{name}' has {width} inputs, no multiple of 64, which "
            f"bitsandbytes decodes wrongly on CPUs ({len(misread)} such matrices); use a GPU, or "
            "list them in model.quantization.skip_modules."
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
    """
    cast(Any, model).config.use_cache = False
    if gradient_checkpointing:
        # Not reentrant: works without input gradients, and under DDP marks no parameter twice.
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
            model.activation_checkpointing_enable(options)  # type: ignore[operator]
        else:
            model.gradient_checkpointing_enable(options)  # type: ignore[operator]
    model.train()
