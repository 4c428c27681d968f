"""Optimizers and learning-rate schedules of a run, and the bytes of their state.

In: an ``OptimizerConfig``, a ``ScheduleConfig`` and ``model.named_parameters()``. Out: a torch
optimizer (bitsandbytes' or torch's own) and a ``LambdaLR``. A setting that the chosen optimizer or
schedule would ignore is an error: silence is how a warm-up gets lost.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.optimization.bitsandbytes_state import settled
from qlora_pl.modeling.optimization.sharded_optimizer import ShardedOptimizer, local_shard
from qlora_pl.modeling.optimization.state_bytes import OptimizerName, state_bytes
from qlora_pl.modeling.optimization.state_precision import report_float32_state

logger = logging.getLogger(__name__)

ScheduleName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_floor", "inverse_sqrt"
]
NamedParameters = Iterable[tuple[str, Tensor]]
LARGE_BASE = 13.5e9  # weights; "13B" models have 13.0e9
LARGE_BASE_LR = 1.0e-4  # the paper's rate above 13B (table 9)

_BITSANDBYTES_CLASSES = {
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_lion_32bit": "PagedLion32bit",
    "paged_lion_8bit": "PagedLion8bit",
    "adamw_32bit": "AdamW32bit",
    "adamw_8bit": "AdamW8bit",
    "lion": "Lion32bit",
}
_IGNORED_SETTINGS = {"adamw": ("momentum",), "lion": ("eps", "momentum"), "sgd": ("betas", "eps")}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer steps the trained parameters, and how far."""

    name: OptimizerName = "paged_adamw_32bit"
    """The optimizer. 'paged' state moves to host memory when the GPU is full; '8bit' state is a
    quarter of '32bit' and approximate; the state of sgd and adamw_torch has the weights' dtype."""
    lr: float = 2.0e-4
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of AdamW and Lion. Lion's paper uses (0.9, 0.99)."""
    eps: float = 1.0e-8
    """AdamW's addition to the denominator; it bounds the step where gradients are tiny."""
    momentum: float = 0.0
    """Share of its last step that sgd repeats; sgd only."""
    weight_decay: float = 0.0
    """Share of a weight lost in a step of lr 1; biases and norms are spared. Decoupled from the
    gradient, except in sgd, where it is an L2 term."""
    lora_plus_ratio: float = 1.0
    """Learning rate of LoRA's B matrices over that of A (LoRA+, Hayou et al. 2024,
    arXiv:2402.12354, who suggest 16); 1 is plain LoRA."""

    def __post_init__(self) -> None:
        """Report every problem in one ``ConfigurationError``."""
        betas_fit = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        checks = {
            "name": (self.name in get_args(OptimizerName), "one of the names in --help"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "betas": (betas_fit, "two numbers from 0 to below 1"),
            "eps": (0 <= self.eps < math.inf, "0 or above"),
            "momentum": (0 <= self.momentum < 1, "from 0 to below 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or above"),
            "lora_plus_ratio": (0 < self.lora_plus_ratio < math.inf, "above 0"),
        }
        problems = _out_of_range("model.optimizer", self, checks)
        for family, ignored in _IGNORED_SETTINGS.items():
            problems += [
                f"model.optimizer.{key}: has no effect with {self.name}, got {value}; remove it."
                for key, value in vars(self).items()
                if family in self.name and key in ignored and value != getattr(type(self), key)
            ]
        if problems:
            raise ConfigurationError(problems)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over a run."""

    name: ScheduleName = "constant"
    """Shape after the warm-up, which all but constant can have: linear and cosine fall to 0 at the
    run's end, cosine_with_floor to min_lr_ratio, inverse_sqrt with the square root of the step."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises to its peak, in equal parts."""
    warmup_ratio: float = 0.0
    """The warm-up as a share of the run's optimizer steps, rounded up."""
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak; cosine_with_floor only."""

    def __post_init__(self) -> None:
        """Report every problem in one ``ConfigurationError``."""
        checks = {
            "name": (self.name in get_args(ScheduleName), "one of the names in --help"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or above"),
            "warmup_ratio": (0 <= self.warmup_ratio < 1, "from 0 to below 1"),
            "min_lr_ratio": (0 <= self.min_lr_ratio < 1, "from 0 to below 1"),
        }
        problems = _out_of_range("model.schedule", self, checks)
        if self.warmup_steps and self.warmup_ratio:
            problems.append(
                f"model.schedule.warmup_steps: {self.warmup_steps} and warmup_ratio: "
                f"{self.warmup_ratio} are two lengths of one warm-up; keep one of them."
            )
        problems += [
            f"model.schedule.{key}: the schedule 'constant' has no warmup and would ignore "
            f"{value}; use constant_with_warmup or set it to 0."
            for key, value in vars(self).items()
            if self.name == "constant" and key.startswith("warmup") and value
        ]
        if self.name != "cosine_with_floor" and self.min_lr_ratio != type(self).min_lr_ratio:
            problems.append(
                f"model.schedule.min_lr_ratio: has no effect with {self.name}, got "
                f"{self.min_lr_ratio}; remove it or use cosine_with_floor."
            )
        if problems:
            raise ConfigurationError(problems)


def _out_of_range(group: str, config: Any, checks: dict[str, tuple[bool, str]]) -> list[str]:
    return [
        f"{group}.{key}: must be {expected}, got {getattr(config, key)}."
        for key, (fits, expected) in checks.items()
        if not fits
    ]


def parameter_groups(
    named_parameters: NamedParameters, config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Group the trained parameters by weight decay and, with LoRA+, by learning rate.

    Returns:
        In this order, without the empty ones: 'decay', 'no_decay' (fewer than two dimensions, or
        'bias' or 'norm' in the name), 'lora_B_decay', 'lora_B_no_decay' (B matrices, unless
        ``lora_plus_ratio`` is 1). 'kind' says which optimizers can load the group's state.

    Raises:
        ConfigurationError: if nothing is trained, or ``lora_plus_ratio`` finds no B matrix.
    """
    order = ("decay", "no_decay", "lora_B_decay", "lora_B_no_decay")
    members: dict[str, list[Tensor]] = {name: [] for name in order}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            parts = name.split(".")
            is_spared = parameter.ndim < 2 or any(
                part.lower().endswith(("bias", "norm")) for part in parts
            )
            is_b = not {"lora_B", "lora_embedding_B"}.isdisjoint(parts)
            prefix = "lora_B_" if is_b and config.lora_plus_ratio != 1 else ""
            members[prefix + ("no_decay" if is_spared else "decay")].append(parameter)
    found = {name: parameters for name, parameters in members.items() if parameters}
    if not found:
        raise ConfigurationError(
            "model.optimizer: no parameter is trained (requires_grad is False for all of them); "
            "attach adapters or unfreeze a layer."
        )
    if config.lora_plus_ratio != 1 and found.keys() <= {"decay", "no_decay"}:
        raise ConfigurationError(
            "model.optimizer.lora_plus_ratio: no trained parameter is a LoRA B matrix, so "
            f"{config.lora_plus_ratio} has no effect; remove it."
        )
    return [
        {
            "name": name,
            "params": parameters,
            "lr": config.lr * (config.lora_plus_ratio if name.startswith("lora_B") else 1),
            "weight_decay": 0.0 if name.endswith("no_decay") else config.weight_decay,
            "kind": _BITSANDBYTES_CLASSES.get(config.name, config.name).removeprefix("Paged"),
        }
        for name, parameters in found.items()
    ]


def build_optimizer(config: OptimizerConfig, named_parameters: NamedParameters) -> Optimizer:
    """Build the optimizer over the trained parameters, which are on their device already.

    Over CPU parameters a paged optimizer becomes its ordinary sibling, which computes the same
    numbers, and one log line says so. Over sharded ones (DTensors) torch's own optimizers work as
    they are, and bitsandbytes' within a ``ShardedOptimizer``.

    Raises:
        ConfigurationError: if nothing is trained.
    """
    groups = parameter_groups(named_parameters, config)
    parameters = [parameter for group in groups for parameter in group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.name == "adamw_torch":
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None
        )

    import bitsandbytes  # slow to import

    class_name = _BITSANDBYTES_CLASSES[config.name]
    if class_name.startswith("Paged") and any(
        local_shard(parameter).device.type == "cpu" for parameter in parameters
    ):
        class_name = class_name.removeprefix("Paged")
        logger.warning(
            f"model.optimizer.name: {config.name} pages its state between GPU and host memory; "
            f"over parameters on the CPU it runs as {class_name}."
        )
    if "8bit" in config.name:
        report_float32_state(parameter.shape for parameter in parameters)
    eps = {"eps": config.eps} if "adamw" in config.name else {}
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), **eps}
    library_class = getattr(bitsandbytes.optim, class_name)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return ShardedOptimizer(
            groups, lambda groups, shapes: settled(library_class, groups, shapes, **settings)
        )
    return settled(library_class, groups, **settings)


def build_schedule(
    config: ScheduleConfig, optimizer: Optimizer, num_training_steps: float
) -> LambdaLR:
    """Build the schedule; step it after every optimizer step.

    Step k of W warm-up steps (k from 1) trains at k/W of the peak. transformers trains it at
    (k - 1)/W, so its first step changes nothing; after the warm-up the two agree.

    Args:
        config: Shape and warm-up.
        optimizer: Its groups' ``lr`` are the peaks.
        num_training_steps: Optimizer steps of the whole run; infinite or -1 if it has no end.

    Returns:
        A schedule whose ``state_dict`` holds only primitives.

    Raises:
        ConfigurationError: if the schedule follows the length of a run that has none.
    """
    follows_length = config.warmup_ratio > 0 or config.name.startswith(("linear", "cosine"))
    if follows_length and not 1 <= num_training_steps < math.inf:
        raise ConfigurationError(
            f"model.schedule: {config.name} with warmup_ratio {config.warmup_ratio} follows the "
            f"length of the run, which is {num_training_steps} steps; set trainer.max_steps."
        )
    warmup = config.warmup_steps
    if config.warmup_ratio > 0:
        # 0.07 * 100 is 7.000000000000001 in binary; 7 steps were asked for, not 8
        warmup = math.ceil(config.warmup_ratio * num_training_steps - 1e-9)
    if config.warmup_steps >= num_training_steps > 0:
        logger.warning(
            f"model.schedule.warmup_steps: {config.warmup_steps} steps of warm-up fill this run of "
            f"{num_training_steps}; what follows the warm-up is never reached."
        )
    decay = _decay(config, warmup, num_training_steps)

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else decay(step)

    # a function: of a callable object LambdaLR would write the __dict__ into checkpoints
    return LambdaLR(optimizer, factor)


def _decay(
    config: ScheduleConfig, warmup: int, num_training_steps: float
) -> Callable[[int], float]:
    """The factor after ``step`` optimizer steps, for ``step >= warmup``."""

    def progress(step: int) -> float:
        # at most 1: a cosine would rise again in a run that goes on past its planned end
        return min(1.0, (step - warmup) / max(1, num_training_steps - warmup))

    if config.name == "linear":
        return lambda step: 1 - progress(step)
    if config.name.startswith("cosine"):
        floor = config.min_lr_ratio if config.name == "cosine_with_floor" else 0.0
        return lambda step: floor + (1 - floor) * (1 + math.cos(math.pi * progress(step))) / 2
    if config.name == "inverse_sqrt":
        return lambda step: math.sqrt(max(1, warmup) / max(1, step))
    return lambda step: 1.0


def warn_of_high_rate(lr: float, model: torch.nn.Module) -> None:
    """Say so if a large base is to be trained at a rate that the paper used for small ones."""
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    if num_weights > LARGE_BASE and lr > LARGE_BASE_LR:
        logger.warning(
            "model.optimizer.lr: %s is high for a base of %.0fB weights; the paper used %s above "
            "13B.",
            lr,
            num_weights / 1e9,
            LARGE_BASE_LR,
        )


def optimizer_state_bytes(
    config: OptimizerConfig,
    shapes: Iterable[Sequence[int]],
    parameter_dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
) -> int:
    """Count the bytes of optimizer state, paged or not, after every parameter took a step.

    Args:
        config: Which optimizer.
        shapes: Shapes of the trained parameters, whole.
        parameter_dtype: Theirs and their gradients'; only sgd's and adamw_torch's state follows it.
        num_shards: Devices that share each parameter; the bytes are those of the fullest.
    """
    return state_bytes(
        config.name, shapes, parameter_dtype.itemsize, num_shards, bool(config.momentum)
    )
