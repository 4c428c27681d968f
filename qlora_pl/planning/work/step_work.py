"""A model's shape and a run's setting -> the sizes that arithmetic and traffic follow from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_pl.planning.memory.storage import num_packed
from qlora_pl.planning.memory.trained import adapted_matrices
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape
from qlora_pl.planning.shapes.parameters import ParameterShape
from qlora_pl.planning.work.operations import Batch, Work

if TYPE_CHECKING:
    from qlora_pl.planning.runs.run_rows import RowFacts

READ_IN_THE_DECODER = ("EncDecAttention.k", "EncDecAttention.v")
"""Of a decoder's matrices those that multiply what the encoder has made of the source."""


def work_of(shape: ModelShape, setting: TrainingSetting) -> Work:
    """The sizes of a model as ``modeling.compute`` counts them of a loaded one.

    Args:
        shape: The model.
        setting: What is trained, and how the base is kept.
    """
    sizes = _BySide()
    for parameter in shape.parameters:
        if len(parameter.shape) > 1 and parameter.role not in ("embedding", "head"):
            sizes.add(shape, parameter, parameter.size * parameter.count)
    trained = _BySide()
    for group in adapted_matrices(shape, setting):
        weights = group.rank * (group.matrix.inputs + group.matrix.outputs)
        trained.add(shape, group.matrix, weights * len(group.names))
    return Work(
        matrices=sizes.source,
        target_matrices=sizes.target,
        adapters=trained.source,
        target_adapters=trained.target,
        head=shape.vocabulary_size * shape.hidden_size,
        attention=shape.queries_size * (shape.num_encoder_layers or shape.num_layers),
        sides=sum((p.inputs + p.outputs) * p.count for p in shape.linears),
        num_layers=shape.num_layers + shape.num_encoder_layers,
        packed=sum(p.size * num_packed(p, setting) for p in shape.linears),
        recomputes=setting.gradient_checkpointing,
        has_dropout=setting.dropout > 0,
        trains_base=not setting.has_adapters,
    )


@dataclass
class _BySide:
    """Weights that source tokens pass and those that target tokens pass."""

    source: int = 0
    target: int = 0

    def add(self, shape: ModelShape, parameter: ParameterShape, weights: int) -> None:
        is_target = (
            shape.num_encoder_layers > 0
            and parameter.name.startswith("decoder.")
            and not parameter.module.endswith(READ_IN_THE_DECODER)
        )
        if is_target:
            self.target += weights
        else:
            self.source += weights


def average_batch(
    shape: ModelShape,
    setting: TrainingSetting,
    rows: RowFacts | None = None,
    mean_length: float | None = None,
) -> Batch:
    """A micro-batch of the run's own rows; where they were not read, one of the longest rows.

    Args:
        shape: Of the model, which has targets apart from sources or not.
        setting: Of the run.
        rows: What was read.
        mean_length: Tokens of a row on average, where that is known and the rows were not read.
    """
    if rows is not None:
        number = rows.num_rows / max(1, rows.num_micro_batches)
        number *= setting.batch_size / rows.rows  # of a micro-batch of another size
        return Batch(
            tokens=number * rows.mean_tokens,
            trained=number * rows.mean_trained,
            pairs=number * rows.mean_pairs,
        )
    targets = 0
    if shape.num_encoder_layers:
        targets = setting.target_tokens_per_row or setting.tokens_per_row
    length = setting.tokens_per_row + targets
    share = 1.0 if mean_length is None else min(1.0, mean_length / length)
    return Batch(
        tokens=share * setting.batch_size * length,
        trained=share * (setting.batch_size * targets or setting.num_trained_tokens),
        pairs=share**2 * setting.batch_size * setting.tokens_per_row**2,
    )
