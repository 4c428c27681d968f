"""A frozen base -> the same base with LoRA adapters, chosen, seeded and attached.

PEFT does the arithmetic, so that every PEFT program can load what is trained here. Ours are the
choice of modules, the type that adapters are kept and multiplied in, and the seed of their start.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.modeling.adapters.dora import keep_magnitude_in
from qlora_pl.modeling.adapters.late_start import LateStarts
from qlora_pl.modeling.adapters.trained_biases import keep_trained_biases_in
from qlora_pl.modeling.base.encoder_decoder import is_encoder_decoder
from qlora_pl.modeling.base.names import PATTERN, by_module, fits, full_match, matches
from qlora_pl.modeling.base.structure import head_name, linear_names

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters: y = W x + (alpha / r) B A x (Hu et al. 2021, arXiv:2106.09685)."""

    method: Literal["lora", "dora", "none"] = "lora"
    """What is trained. ``lora``: adapters. ``dora``: adapters, and the length of each row of W + BA
    apart from its direction (Liu et al. 2024, arXiv:2402.09353). ``none``: no adapters, but every
    weight of the base."""
    r: int = 64
    """Rank: rows of A and columns of B. The paper found 8 to 256 alike; 64 is what it used."""
    alpha: float = 16.0
    """Numerator of the scale ``alpha / r``. The paper kept 16 and searched the learning rate."""
    use_rslora: bool = False
    """Scale by ``alpha / sqrt(r)`` instead, so that high ranks learn as fast (Kalajdzievski 2023,
    arXiv:2312.03732)."""
    dropout: float = 0.0
    """Share of the adapter's inputs set to zero in training. Paper: 0.1 up to 13B, else 0.05."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which of the base's biases train as well, kept in ``dtype``: those of the adapted modules
    (``lora_only``) or every one (``all``)."""
    target_modules: str | list[str] = ALL_LINEAR
    """``all-linear`` (all but the head, which the paper found necessary), a list of module names
    or their last parts, or one regular expression for whole names."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of some modules: names, their last parts, or regular expressions, to ``r``. Of
    several that fit a module the first counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Values of ``alpha`` for some modules, named as in ``rank_pattern``."""
    trainable_tokens: list[str] = field(default_factory=list)
    """Tokens whose rows of the embedding (and of a head of its own) are trained and saved too, for
    a template whose markers the base has never seen."""
    init: Literal["kaiming", "gaussian", "eva", "pissa", "olora", "corda", "loftq"] = "kaiming"
    """How A starts; B starts at zero, so that training starts at the base. ``kaiming`` (uniform)
    and ``gaussian`` are random; ``eva``: the directions in which the first rows' activations vary
    most (Paischer et al. 2024, arXiv:2410.07170). The others change the base and are refused."""
    init_from: str | None = None
    """An adapter to go on from, with a fresh optimizer: a folder, or a name on the Hub. Its base,
    ranks and modules must be this run's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What trained weights are kept in. float32, because an update of 2e-4 is lost in bfloat16's 8
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
            problems += _no_expression("target_modules", self.target_modules)
        for key, pattern in (
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
        ):
            for name, value in pattern.items():
                problems += _no_expression(key, name, PATTERN)
                if value <= 0:
                    problems.append(f"model.lora.{key}: '{name}' must be above 0, got {value}.")
        if self.init in BASE_CHANGING:
            problems.append(
                f"model.lora.init: {self.init} {BASE_CHANGING[self.init]}, so that no program "
                "that loads the adapter over the base would compute what was trained; use kaiming, "
                "gaussian or eva."
            )
        if self.init_from is not None and self.init != "kaiming":
            problems.append(
                f"model.lora.init: {self.init} has no effect with init_from, which brings A and B; "
                "remove one of them."
            )
        if not self.has_adapters and self.trainable_tokens:
            problems.append("model.lora.trainable_tokens: method none trains every row; remove it.")
        if not self.has_adapters and self.init_from is not None:
            problems.append("model.lora.init_from: there is no adapter with method: none.")
        if problems:
            raise ConfigurationError(problems)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, not the base itself."""
        return self.method != "none"


BASE_CHANGING = {
    "pissa": "moves the base's largest directions into the adapter and leaves a changed base",
    "olora": "subtracts the adapter's start from the base, which 4 bits cannot hold",
    "corda": "moves directions of the base into the adapter and leaves a changed base",
    "loftq": "needs another quantised base than the one that was made",
}


def _no_expression(key: str, pattern: str, form: str = "{}") -> list[str]:
    try:
        re.compile(pattern)
        re.compile(form.format(pattern))
    except re.error as error:
        return [f"model.lora.{key}: '{pattern}' is not a regular expression ({error})."]
    return []


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


def _last_parts(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _no_such_target(wanted: str, candidates: list[str]) -> str:
    parts = _last_parts(candidates)
    close = difflib.get_close_matches(wanted, parts, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return (
        f"model.lora.target_modules: no linear module matches '{wanted}'{hint} "
        f"(there are {', '.join(parts)})."
    )


def refuse_unfit_ranks(model: nn.Module, config: LoRAConfig, targets: list[str]) -> None:
    """Patterns must match a target, and no rank may exceed what its layer can have.

    Raises:
        ConfigurationError: naming the pattern or the layer.
    """
    for key, pattern in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        for name in pattern:
            if not any(fits(name, target) for target in targets):
                raise ConfigurationError(
                    f"model.lora.{key}: no adapted module matches '{name}'"
                    f"{did_you_mean(name, _last_parts(targets))}"
                )
    for target, named in by_module(config.rank_pattern, targets, None).items():
        most = min(model.get_submodule(target).weight.shape)  # type: ignore[arg-type]
        rank = config.r if named is None else named
        if rank > most:
            key = "r" if named is None else "rank_pattern"
            other = ", or give this module less in model.lora.rank_pattern" if key == "r" else ""
            raise ConfigurationError(
                f"model.lora.{key}: {rank} is above {most}, the most that '{target}' can have; "
                f"lower it{other}."
            )


def _in_any_order(pattern: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    """The same with one entry a module where several fit: PEFT sorts entries when it saves them."""
    if all(sum(fits(name, target) for name in pattern) <= 1 for target in targets):
        return dict(pattern)
    chosen = by_module(pattern, targets, None)
    return {target: value for target, value in chosen.items() if value is not None}


def attach_adapters(
    model: nn.Module,
    config: LoRAConfig,
    seed: int,
    new_rows: Mapping[str, list[int]] | None = None,
    starts: LateStarts | None = None,
) -> nn.Module:
    """Wrap a base into a PEFT model with fresh adapters; everything else is frozen.

    Args:
        model: The loaded base, or an empty one with ``starts``.
        config: What to attach.
        seed: Of A's random start. The global generators are left as they were, so that a run does
            not depend on what happened while loading.
        new_rows: Rows of the embedding and the head that are trained too, by module.
        starts: Draws the adapters of an empty base later, which until then are as empty.
    """
    import peft  # slow to import

    targets = resolve_targets(model, config)
    peft_config = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        use_rslora=config.use_rslora,
        use_dora=config.method == "dora",
        lora_dropout=config.dropout,
        bias=config.bias,
        target_modules=_shortest_names(model, targets),
        rank_pattern=_in_any_order(config.rank_pattern, targets),
        alpha_pattern=_in_any_order(config.alpha_pattern, targets),
        init_lora_weights=True if config.init == "kaiming" else config.init,
        eva_config=peft.EvaConfig(rho=1.0) if config.init == "eva" else None,  # 1: equal ranks
        trainable_token_indices=dict(new_rows) if new_rows else None,
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    noting = starts.noting() if starts is not None else nullcontext()
    with torch.random.fork_rng(devices), warnings.catch_warnings(), noting:
        # PEFT asks transformers 5.2x for a property under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, peft_config, autocast_adapter_dtype=False)
        except ValueError as error:
            _refuse_moved(model, peft_config, targets)
            raise ConfigurationError(
                f"model.lora.target_modules: PEFT cannot adapt this {type(model).__name__} "
                f"({str(error).splitlines()[0].rstrip('.')}); leave such modules out."
            ) from error
    _refuse_moved(model, peft_config, targets)
    dtype = getattr(torch, config.dtype)
    keep_adapters_in(adapted, dtype)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data = parameter.data.to(dtype)
    keep_trained_biases_in(adapted, dtype)
    return adapted


def _refuse_moved(model: nn.Module, peft_config: Any, targets: list[str]) -> None:
    """PEFT reads some mixtures' names as those of an older layout, and adapts the experts instead.

    Every program that loads the adapter does the same, so it is of no use to prevent it here.

    Raises:
        ConfigurationError: with the names that PEFT takes as they are.
    """
    stayed = [name for name in targets if matches(name, list(peft_config.target_modules))]
    if moved := [name for name in targets if name not in stayed]:
        raise ConfigurationError(
            f"model.lora.target_modules: PEFT reads '{moved[0]}' in a {type(model).__name__} as a "
            "name of its fused experts, and would adapt those; set model.lora.target_modules: "
            f"[{', '.join(sorted(_last_parts(stayed)))}]."
        )


def _shortest_names(model: nn.Module, targets: list[str]) -> list[str]:
    """Last parts of the names where these say the same, which is what other programs expect."""
    parts = sorted({name.rpartition(".")[2] for name in targets})
    meant = {name for name, _ in model.named_modules() if matches(name, parts)}
    return parts if meant == set(targets) else targets


def keep_adapters_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep adapters in a type, in which they do not multiply; see ``CastingLinear``."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            _keep_in(module, dtype)


def _keep_in(layer: Any, dtype: torch.dtype) -> None:
    layer.cast_input_dtype_enabled = False
    for adapters in (layer.lora_A, layer.lora_B):
        for linear in adapters.values():
            linear.to(dtype)
            linear.__class__ = CastingLinear
    for magnitude in layer.lora_magnitude_vector.values():
        keep_magnitude_in(layer, magnitude, dtype)
