"""What is wrong with the settings of a data module, found before a row is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_pl.data.batches.global_batch import AUTO
from qlora_pl.data.batches.ordering import padded_width


def setting_problems(data: Any) -> list[str]:
    """One sentence for each setting of an ``InstructionDataModule`` that cannot be meant."""
    ranges = [*_of_rows(data), *_of_batches(data)]
    return [f"data.{sentence}" for holds, sentence in ranges if not holds]


def pair_problems(data: Any) -> list[str]:
    """The same for settings that rows with a source and a target cannot have."""
    problems = []
    if data.packing is True:
        problems.append(
            "data.packing: the encoder of this model has no positions that could tell packed rows "
            "apart; set it to false."
        )
    if data.padding != "longest":
        problems.append("data.padding: pairs have two widths; set it to longest.")
    if data.tokens_per_batch is not None:
        problems.append("data.tokens_per_batch: pairs have two widths; set batch_size instead.")
    return problems


def _of_rows(data: Any) -> Iterator[tuple[bool, str]]:
    yield data.max_length >= 2, f"max_length: must be at least 2, got {data.max_length}."
    yield (
        0 <= data.max_lost_ratio <= 1,
        f"max_lost_ratio: must lie in 0 to 1, got {data.max_lost_ratio}.",
    )
    yield data.val_size >= 0, f"val_size: must be 0 or more, got {data.val_size}."
    yield (
        isinstance(data.val_size, int) or data.val_size < 1,
        f"val_size: a share lies below 1, got {data.val_size}; write a whole number for rows.",
    )
    yield data.window is None or data.window >= 1, f"window: must be at least 1, got {data.window}."
    streamed = [source.name for source in data.sources.sources if source.streaming]
    yield (
        not streamed or data.window is not None,
        f"window: '{', '.join(streamed)}' is streamed and cannot be read before training; set it, "
        "for example to 10000.",
    )
    for name in ("max_train_samples", "max_val_samples"):
        limit = getattr(data, name)
        yield limit is None or limit >= 1, f"{name}: must be at least 1, got {limit}."


def _of_batches(data: Any) -> Iterator[tuple[bool, str]]:
    yield data.batch_size >= 1, f"batch_size: must be at least 1, got {data.batch_size}."
    yield (
        data.eval_batch_size >= 1 or data.eval_batch_size == data.batch_size,
        f"eval_batch_size: must be at least 1, got {data.eval_batch_size}.",
    )
    yield (
        data.global_batch_size is None or data.global_batch_size >= 1,
        f"global_batch_size: must be at least 1, got {data.global_batch_size}.",
    )
    yield (
        data.asked_batch_size != AUTO or data.tokens_per_batch is None,
        "batch_size: auto counts rows, and tokens_per_batch tokens; leave out one of the two.",
    )
    yield (
        data.asked_batch_size != AUTO or data.packing != AUTO,
        "batch_size: auto is chosen for rows that are packed or not; with it, set packing to true "
        "or false.",
    )
    yield data.num_workers >= 0, f"num_workers: must be 0 or more, got {data.num_workers}."
    if (budget := data.tokens_per_batch) is None:
        return
    yield (
        data.packing is False,
        "tokens_per_batch: packs have max_length tokens; set packing to false, or tokens_per_batch "
        "to null.",
    )
    yield (
        data.group_by_length,
        "tokens_per_batch: needs group_by_length: true, which puts rows of like length together.",
    )
    width = padded_width(data.max_length)
    yield (
        budget >= width,
        f"tokens_per_batch: {budget} does not hold a row of max_length tokens, padded to {width}.",
    )
