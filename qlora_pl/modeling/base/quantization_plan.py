"""What is to become of every weight matrix of a base, decided from its structure before loading.

transformers leaves matrices unquantised without a word (subclasses of ``nn.Linear``, fused
experts). Here each one is planned by name, what cannot be done is refused, and loading is held
against the plan.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.encoder_decoder import auto_class, refuse_unknown_start
from qlora_pl.modeling.base.identity import refuse_code_from_elsewhere
from qlora_pl.modeling.base.names import matches
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.structure import (
    Role,
    head_name,
    is_conv1d,
    is_plain_product,
    matrices,
)

AttentionKernel = Literal["auto", "sdpa", "eager", "flash_attention_2"]
NEGLIGIBLE_SHARE = 0.01
"""Unrecognised matrices (a convolution's kernel, say) up to this share stay as they are, listed."""


@dataclass(frozen=True)
class QuantizationPlan:
    """What is to become of every weight matrix of a base."""

    quantized: dict[str, tuple[int, ...]]
    """Parameters to be packed, and their shapes."""
    kept: dict[str, Role]
    """Parameters that stay as they are, and why (``linear``: listed in ``skip_modules``, or
    ``fragile``)."""
    head: str | None
    """The output head; a tied one has no parameter of its own but must be left alone as well."""
    fragile: tuple[str, ...] = ()
    """Those kept because the family's authors except them from 16 bits (T5's ``wo``)."""
    replaced_classes: tuple[str, ...] = ()
    """Subclasses of ``nn.Linear`` that are quantised here, and left alone by plain transformers."""

    @property
    def kept_modules(self) -> list[str]:
        """The modules that transformers must leave alone."""
        # It reads a name as that of everything below it too, and packs linear modules alone.
        modules = [
            name.rpartition(".")[0]
            for name, role in self.kept.items()
            if role in ("linear", "router", "head")
        ]
        return modules if self.head in (None, *modules) else [*modules, str(self.head)]


def build_skeleton(
    folder: Path, attn_implementation: AttentionKernel = "auto", trust_remote_code: bool = False
) -> nn.Module:
    """The model without its weights, on the meta device: names and shapes at no cost.

    Raises:
        ConfigurationError: if transformers knows no such model, or it does not write text, or its
            code would have to be run and may not be.
    """
    from transformers import AutoConfig  # slow to import

    if trust_remote_code:
        refuse_code_from_elsewhere(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            skeleton: nn.Module = auto_class(config).from_config(
                config,
                attn_implementation=kernel_name(attn_implementation),
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # an unknown architecture raises KeyError, ValueError, ImportError
        if "trust_remote_code" in str(error):
            raise ConfigurationError(
                f"model.trust_remote_code: '{folder}' brings Python code of its own; read it, set "
                "model.revision to the commit you read, and set model.trust_remote_code: true."
            ) from error
        raise ConfigurationError(
            "model.model_name_or_path: transformers cannot build a causal language model, or one "
            f"with an encoder and a decoder, from '{folder}' "
            f"({(str(error).splitlines() or [type(error).__name__])[0]})."
        ) from error
    refuse_unknown_start(skeleton)
    return skeleton


def kernel_name(kernel: AttentionKernel) -> str | None:
    """The kernel in transformers' words, where None is the best that a family has."""
    return None if kernel == "auto" else kernel


def plan_quantization(skeleton: nn.Module, config: QuantizationConfig) -> QuantizationPlan:
    """Decide on every weight matrix from the model's structure.

    Raises:
        ConfigurationError: naming what cannot be quantised, and entries of ``skip_modules`` that
            match nothing.
    """
    quantized: dict[str, tuple[int, ...]] = {}
    kept: dict[str, Role] = {}
    sizes: Counter[Role] = Counter()
    fragile = fragile_modules(skeleton)
    for name, parameter, role in matrices(skeleton):
        owner = name.rpartition(".")[0]
        listed = matches(owner, config.skip_modules)
        is_packed = config.is_quantized and role == "linear" and not matches(owner, fragile)
        if is_packed and not listed:
            quantized[name] = tuple(parameter.shape)
        else:
            kept[name] = role
            sizes[role] += 0 if listed else parameter.numel()
    refuse_unmatched(config.skip_modules, [*quantized, *kept])
    spared = fragile_linears(skeleton, kept)
    if not config.is_quantized:
        return QuantizationPlan(quantized, kept, head_name(skeleton), spared)
    num_weights = sum(parameter.numel() for parameter in skeleton.parameters())
    _refuse_unquantizable(kept, sizes, num_weights, config)
    if not quantized:
        raise ConfigurationError(
            "model.quantization.skip_modules: nothing is left to quantise; name fewer modules, or "
            "set quant_type: none."
        )
    _refuse_unfit_shapes(skeleton, quantized, config)
    classes = replaced_classes(skeleton, quantized)
    return QuantizationPlan(quantized, kept, head_name(skeleton), spared, classes)


def fragile_modules(model: Any) -> list[str]:
    """Last parts of the modules that a family's authors keep out of 16 bits, let alone of 4."""
    return sorted(getattr(model, "_keep_in_fp32_modules", None) or ())


def fragile_linears(skeleton: nn.Module, kept: dict[str, Role]) -> tuple[str, ...]:
    """The linear ones among the parameters that are kept."""
    fragile = fragile_modules(skeleton)
    return tuple(
        name
        for name, role in kept.items()
        if role == "linear" and matches(name.rpartition(".")[0], fragile)
    )


def refuse_unmatched(skip_modules: tuple[str, ...], names: list[str]) -> None:
    """Refuse entries of ``skip_modules`` to which none of the named matrices belongs."""
    owners = [name.rpartition(".")[0] for name in names]
    unmatched = [e for e in skip_modules if not any(matches(owner, [e]) for owner in owners)]
    if unmatched:
        raise ConfigurationError(
            f"model.quantization.skip_modules: no weight matrix belongs to "
            f"{', '.join(sorted(unmatched))}; write a module's name or the last part of it."
        )


def _refuse_unquantizable(
    kept: dict[str, Role], sizes: Counter[Role], num_weights: int, config: QuantizationConfig
) -> None:
    """Refuse a base of which a large part would silently stay in 16 bits.

    Raises:
        ConfigurationError: naming an example and how to accept it.
    """
    for role, what in (
        ("experts", "holds fused experts"),
        ("other", "belongs to no linear module"),
    ):
        share = sizes[role] / num_weights  # type: ignore[index]
        if share > (NEGLIGIBLE_SHARE if role == "other" else 0):
            name = next(
                name
                for name, its in kept.items()
                if its == role and not matches(name.rpartition(".")[0], config.skip_modules)
            )
            owner = name.rpartition(".")[0].rpartition(".")[2]
            raise ConfigurationError(
                f"model.quantization: '{name}' {what} and cannot be quantised here ({share:.0%} of "
                f"the weights); set model.quantization.skip_modules: [{owner}] to keep such "
                "unquantised, or take a dense model."
            )


def _refuse_unfit_shapes(
    skeleton: nn.Module, quantized: dict[str, tuple[int, ...]], config: QuantizationConfig
) -> None:
    """Refuse matrices that the blocks do not divide (those fill words of any storage type).

    Blocks that run from one row into the next are decoded wrongly by bitsandbytes 0.50 on CPUs with
    AVX-512: outputs are 20 to 40 % off (normal weights, rows of 16 to 208).

    Raises:
        ConfigurationError: naming the first of them.
    """
    if not config.is_four_bits:
        return
    for name, shape in quantized.items():
        module = skeleton.get_submodule(name.rpartition(".")[0])
        inputs = shape[0] if is_conv1d(module) else shape[-1]
        if inputs % config.block_size:
            raise ConfigurationError(
                f"model.quantization.block_size: '{name}' has {inputs} inputs, no multiple of "
                f"{config.block_size}, so a block would span two rows, which bitsandbytes decodes "
                f"wrongly on CPUs; list '{name.split('.')[-2]}' in model.quantization.skip_modules"
                f"{', or choose a smaller block' if config.block_size > 64 else ''}."
            )


def replaced_classes(skeleton: nn.Module, quantized: dict[str, Any]) -> tuple[str, ...]:
    """Subclasses of ``nn.Linear`` among what is quantised, each proved to be a plain product.

    Raises:
        ConfigurationError: naming one that computes something else.
    """
    classes: set[type] = set()
    tried = set()
    for name in quantized:
        owner = name.rpartition(".")[0]
        module = skeleton.get_submodule(owner)
        kind = type(module)
        if kind is nn.Linear or is_conv1d(module):
            continue
        classes.add(kind)
        # Modules of one class may be set up differently: a factor of 1 here and of 2 there.
        own = vars(module).keys() - vars(nn.Linear(1, 1, device="meta")).keys()
        alike = (kind, *(f"{key}={vars(module)[key]}" for key in sorted(own)))
        if alike not in tried and not is_plain_product(module):
            raise ConfigurationError(
                f"model.quantization: '{owner}' is a {kind.__name__}, which does more than multiply"
                " by its weight, so it cannot be replaced by a quantised layer; list "
                f"'{owner.rpartition('.')[2]}' in model.quantization.skip_modules."
            )
        tried.add(alike)
    return tuple(sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in classes))
