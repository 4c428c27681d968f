"""A frozen base -> the same base with LoRA adapters, chosen, seeded, counted and collected.

PEFT does the arithmetic, so that every PEFT program can load what is trained here. Ours are the
choice of modules, the type that adapters are kept and multiplied in, and the seed of their start.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.structure import full_match, head_name, linear_names, matches

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters: y = W x + (alpha / r) B A x (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = 64
    """Rank: rows of A and columns of B. The paper found 8 to 256 alike; 64 is what it used."""
    alpha: float = 16.0
    """Numerator of the scale alpha / r. The paper kept 16 and searched the learning rate."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training. Paper: 0.1 up to 13B, else 0.05."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which of the base's biases train as well."""
    target_modules: str | list[str] = ALL_LINEAR
    """``all-linear`` (all but the head, which the paper found necessary), a list of module names
    or their last parts, or one regular expression for whole names."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts; B starts at zero, so that training starts at the base."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the adapters are kept in. float32, because an update of 2e-4 is lost in bfloat16's 8
    bits once a weight has grown; they multiply in the activations' type either way."""

    def __post_init__(self) -> None:
        problems = []
        if self.r < 1:
            problems.append(f"model.lora.r: must be at least 1, got {self.r}.")
        if self.alpha <= 0:
            problems.append(f"model.lora.alpha: must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            problems.append(
                f"model.lora.dropout: must lie in 0 to 1, without 1, got {self.dropout}."
            )
        if not self.target_modules:
            problems.append("model.lora.target_modules: names no module; write all-linear.")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            try:
                re.compile(self.target_modules)
            except re.error as error:
                problems.append(
                    f"model.lora.target_modules: '{self.target_modules}' is not a regular "
                    f"expression ({error})."
                )
        if problems:
            raise ConfigurationError(problems)


class CastingLinear(nn.Linear):
    """A linear layer that multiplies in its input's type, whatever its weight is kept in.

    Float32 adapters over bfloat16 activations: PEFT alone would cast the activations up, copy them
    for every adapter and run float32 products.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``, in the type of the input."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


def resolve_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The full names of the modules to adapt.

    Args:
        model: The base, or its skeleton on the meta device.
        config: ``target_modules`` in any of its three forms.

    Raises:
        ConfigurationError: if nothing matches, a name matches nothing, or the head is among them.
    """
    linear = linear_names(model)
    head = head_name(model)
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        return linear
    candidates = [*linear, head] if head is not None else linear
    if isinstance(wanted, str):
        chosen = full_match(wanted, candidates) or [n for n in candidates if matches(n, [wanted])]
    else:
        for name in wanted:
            if not any(matches(candidate, [name]) for candidate in candidates):
                raise ConfigurationError(_no_such_target(name, candidates))
        chosen = [name for name in candidates if matches(name, wanted)]
    if not chosen:
        raise ConfigurationError(_no_such_target(str(wanted), candidates))
    if head in chosen:
        raise ConfigurationError(
            f"model.lora.target_modules: '{head}' is the output head, which is not adapted (an "
            "adapter on it would also move a tied embedding); leave it out."
        )
    return chosen


def _no_such_target(wanted: str, candidates: list[str]) -> str:
    parts = list(dict.fromkeys(name.rpartition(".")[2] for name in candidates))
    close = difflib.get_close_matches(wanted, parts, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return (
        f"model.lora.target_modules: no linear module matches '{wanted}'{hint} "
        f"(there are {', '.join(parts)})."
    )


def attach_adapters(model: nn.Module, config: LoRAConfig, seed: int) -> nn.Module:
    """Wrap a base into a PEFT model with fresh adapters; everything else is frozen.

    Args:
        model: The loaded base.
        config: What to attach.
        seed: Of A's random start. The global generators are left as they were, so that a run does
            not depend on what happened while loading.
    """
    import peft  # slow to import

    targets = resolve_targets(model, config)
    peft_config = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias=config.bias,
        target_modules=_shortest_names(model, targets),
        init_lora_weights=True if config.init == "kaiming" else config.init,
        task_type="CAUSAL_LM",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        # PEFT asks transformers 5.2x for a property under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        torch.manual_seed(seed)
        adapted: nn.Module = peft.get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    for module in adapted.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            _keep_in(module, getattr(torch, config.dtype))
    return adapted


def _shortest_names(model: nn.Module, targets: list[str]) -> list[str]:
    """Last parts of the names where these say the same, which is what other programs expect."""
    parts = sorted({name.rpartition(".")[2] for name in targets})
    meant = {name for name, _ in model.named_modules() if matches(name, parts)}
    return parts if meant == set(targets) else targets


def _keep_in(layer: Any, dtype: torch.dtype) -> None:
    layer.cast_input_dtype_enabled = False
    for adapters in (layer.lora_A, layer.lora_B):
        for linear in adapters.values():
            linear.to(dtype)
            linear.__class__ = CastingLinear


def logical_size(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for; packed 4-bit bytes count as what they hold."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


@dataclass(frozen=True)
class ParameterCounts:
    """How many weights a model has, by what they are kept in."""

    by_dtype: dict[str, int]
    """Logical weights by type, for example ``nf4``, ``bfloat16``, ``float32``."""
    trainable: int
    stored_bytes: int
    """Bytes of all parameters as they are stored, quantisation statistics included."""

    @property
    def total(self) -> int:
        """All logical weights."""
        return sum(self.by_dtype.values())


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count logical weights; a tied weight once."""
    by_dtype: Counter[str] = Counter()
    trainable = stored = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = logical_size(parameter)
        by_dtype[str(parameter.dtype).split(".")[-1] if state is None else state.quant_type] += size
        stored += parameter.numel() * parameter.element_size()
        stored += 0 if state is None else _statistics_bytes(state)
        trainable += size if parameter.requires_grad else 0
    return ParameterCounts(dict(by_dtype), trainable, stored)


def _statistics_bytes(state: Any) -> int:
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter as PEFT names and saves it, copied to the CPU."""
    import peft  # slow to import

    # Left to itself PEFT looks the base's folder or Hub page up, in case its vocabulary has grown.
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
