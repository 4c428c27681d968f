"""A run's first micro-batch, line by line: what is read, what is trained, what only fills.

Works for every shape of a batch: padded rows, lines that hold several rows one after another, and
pairs of a source and a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.datamodule import InstructionDataModule

READ, TRAINED, PADDING = "read", "trained", "padding"


class Stretch(NamedTuple):
    """Neighbouring tokens of one kind."""

    kind: str
    start: int
    end: int


class Line(NamedTuple):
    """One line of the batch."""

    stretches: list[Stretch]
    row_starts: list[int]
    """Where its rows begin: one of a padded line, several of a pack."""


class BatchPicture(NamedTuple):
    """A micro-batch in numbers."""

    width: int
    """Tokens of each line."""
    lines: list[Line]
    num_rows: int
    num_trained: int
    num_padding: int


def first_batch(data: InstructionDataModule) -> BatchPicture | None:
    """What one device is given first; None if there is no row to train on."""
    if "train" not in data.splits or not len(data.splits["train"].rows):
        return None
    loader: Any = data.train_dataloader()
    return picture(loader.dataset[next(iter(loader.sampler))])  # by no worker, to no device


def picture(batch: Mapping[str, Any]) -> BatchPicture:
    """The numbers of a batch of torch tensors, as ``batch.Batch`` describes them."""
    if "decoder_attention_mask" in batch:
        batch = _side_by_side(batch)
    labels = np.asarray(batch["labels"])
    row_starts, is_read = _packed(batch) if "position_ids" in batch else _padded(batch)
    is_trained = labels != IGNORE_INDEX
    kinds = np.where(is_trained, TRAINED, np.where(is_read, READ, PADDING))
    lines = [Line(_stretches(line), starts) for line, starts in zip(kinds, row_starts, strict=True)]
    return BatchPicture(
        width=labels.shape[1],
        lines=lines,
        num_rows=sum(map(len, row_starts)),
        num_trained=int(is_trained.sum()),
        num_padding=int((~is_read).sum()),
    )


def _side_by_side(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Pairs as padded rows: each line a source and its padding, then a target and its own."""
    source, target = batch["attention_mask"], batch["decoder_attention_mask"]
    nothing = np.full(np.shape(source), IGNORE_INDEX)
    return {
        "attention_mask": np.concatenate([np.asarray(source), np.asarray(target)], axis=1),
        "labels": np.concatenate([nothing, np.asarray(batch["labels"])], axis=1),
    }


def _padded(batch: Mapping[str, Any]) -> tuple[list[list[int]], np.ndarray]:
    is_read = np.asarray(batch["attention_mask"]) > 0
    return [[0] for _ in is_read], is_read


def _packed(batch: Mapping[str, Any]) -> tuple[list[list[int]], np.ndarray]:
    """Rows begin where positions are 0 again; what is left of a line begins so too.

    It is told from a row by its labels: of every row something is trained.
    """
    positions, labels = np.asarray(batch["position_ids"]), np.asarray(batch["labels"])
    is_read = np.ones(positions.shape, dtype=bool)
    row_starts: list[list[int]] = []
    for line in range(len(positions)):
        starts = np.flatnonzero(positions[line] == 0).tolist()
        if (labels[line, starts[-1] :] == IGNORE_INDEX).all():
            is_read[line, starts.pop() :] = False
        row_starts.append(starts)
    return row_starts, is_read


def _stretches(kinds: np.ndarray) -> list[Stretch]:
    starts = np.flatnonzero(np.r_[True, kinds[1:] != kinds[:-1]]).tolist()
    ends = [*starts[1:], len(kinds)]
    return [Stretch(str(kinds[a]), a, b) for a, b in zip(starts, ends, strict=True)]
