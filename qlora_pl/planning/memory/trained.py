"""What is trained: adapters, biases, rows of embeddings, or every weight; with sizes and bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.modeling.base.names import by_module, full_match, matches
from qlora_pl.modeling.optimization.state_bytes import paged_bytes, state_bytes
from qlora_pl.modeling.optimization.state_precision import shard_rows
from qlora_pl.planning.memory.training_setting import ITEM_SIZES, TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape
from qlora_pl.planning.shapes.parameters import ParameterShape

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """Adapters over one kind of matrix in layers where they have one rank."""

    matrix: ParameterShape
    rank: int
    names: tuple[str, ...]
    """The modules."""


def adapted_matrices(shape: ModelShape, setting: TrainingSetting) -> list[Adapted]:
    """The matrices that get adapters.

    Raises:
        ConfigurationError: if ``target_modules`` names nothing of this model.
    """
    if not setting.has_adapters:
        return []
    by_kind = {name: p for p in shape.linears for name in p.module_names()}
    targets = chosen_names(list(by_kind), setting.target_modules)
    groups: dict[tuple[str, tuple[int, ...], int], list[str]] = {}
    for name, rank in by_module(setting.rank_pattern, targets, setting.r).items():
        matrix = by_kind[name]
        groups.setdefault((matrix.name, matrix.shape, rank), []).append(name)
    matrices = {(p.name, p.shape): p for p in shape.linears}
    return [
        Adapted(matrix=matrices[name, sizes], rank=rank, names=tuple(names))
        for (name, sizes, rank), names in groups.items()
    ]


def chosen_names(names: list[str], targets: str | tuple[str, ...]) -> list[str]:
    """The modules that ``model.lora.target_modules`` means.

    Raises:
        ConfigurationError: if it means none.
    """
    if targets == ALL_LINEAR:
        return names
    if isinstance(targets, str):
        try:
            chosen = full_match(targets, names)
        except re.error:
            chosen = []
        chosen = chosen or [name for name in names if matches(name, [targets])]
        wanted = [] if chosen else [targets]
    else:
        chosen = [name for name in names if matches(name, tuple(targets))]
        wanted = [t for t in targets if not any(matches(name, [t]) for name in names)]
    if wanted:
        parts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise ConfigurationError(
            f"model.lora.target_modules: no linear module matches '{wanted[0]}'"
            f"{did_you_mean(wanted[0], parts)}"
        )
    return chosen


def trained_shapes(shape: ModelShape, setting: TrainingSetting) -> list[tuple[int, ...]]:
    """The shapes of all trained tensors, whole."""
    if not setting.has_adapters:
        return [p.shape for p in shape.parameters for _ in range(p.count)]
    shapes: list[tuple[int, ...]] = []
    adapted = adapted_matrices(shape, setting)
    for group in adapted:
        of_one: list[tuple[int, ...]] = [
            (group.rank, group.matrix.inputs),
            (group.matrix.outputs, group.rank),
        ]
        if setting.method == "dora":
            of_one.append((group.matrix.outputs,))
        shapes += of_one * len(group.names)
    shapes += trained_biases(shape, setting, adapted)
    if setting.num_trained_rows:
        for _ in range(1 if shape.ties_head else 2):
            shapes.append((setting.num_trained_rows, shape.hidden_size))
    return shapes


def trained_biases(
    shape: ModelShape, setting: TrainingSetting, adapted: list[Adapted]
) -> list[tuple[int, ...]]:
    """The biases that are trained beside adapters."""
    if setting.bias == "none":
        return []
    names = {name for group in adapted for name in group.names}
    return [
        parameter.shape
        for parameter in shape.parameters
        if parameter.name.endswith(".bias")
        for name in parameter.module_names()
        if setting.bias == "all" or name in names
    ]


@dataclass(frozen=True, kw_only=True)
class TrainedBytes:
    """Bytes of what is trained, on the device that has the most of it."""

    num_parameters: int
    """Trained weights, whole."""
    weights: int
    state: int
    """Optimizer state that stays where it is."""
    paged_state: int
    """Optimizer state that the driver can move to the host."""


def trained_bytes(shape: ModelShape, setting: TrainingSetting) -> TrainedBytes:
    """Count what is trained; gradients are of the weights' type and size."""
    shapes = trained_shapes(shape, setting)
    item = ITEM_SIZES[setting.adapter_dtype]
    shards = setting.num_shards
    total = state_bytes(setting.optimizer, shapes, item, shards, setting.has_momentum)
    paged = paged_bytes(setting.optimizer, shapes, shards) if setting.device == "cuda" else 0
    parts = sum(math.prod((shard_rows(sizes, shards), *sizes[1:])) for sizes in shapes)
    return TrainedBytes(
        num_parameters=sum(math.prod(sizes) for sizes in shapes),
        weights=item * parts,
        state=total - paged,
        paged_state=paged,
    )
