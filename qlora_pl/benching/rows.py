"""Rows that are drawn: random tokens, in lengths as data sets have them.

The same seed gives the same lists of tokens on every machine and to every program that is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from qlora_pl.batch import PackingProbe
from qlora_pl.benching.settings import Workload
from qlora_pl.data.batches.batching import (
    BatchLayout,
    BatchShape,
    ResumableSampler,
    TrainingBatches,
    make_loader,
)
from qlora_pl.data.batches.collation import make_packing_probe
from qlora_pl.data.rows.encoded_rows import EncodedRows

MEDIAN_AND_SPREAD = {"alpaca": (85, 0.62), "oasst": (330, 0.75), "chat": (900, 0.8)}
"""Tokens of the median row, and the standard deviation of their logarithm."""
FIRST_TOKEN = 3
"""Ids below are special in most vocabularies; 0 fills what is left of a line."""
PAD_ID = 0
PROMPT_SHARE = 0.3
"""Of a row's tokens, its first ones; they are not trained on."""
LEAST_TOKENS = 4
MORE_STEPS = 2
"""Beyond those that are asked for, so that no measured step is the short one of an epoch's end."""


def row_lengths(workload: Workload, number: int) -> np.ndarray:
    """``(number,)`` tokens of each row."""
    if workload.lengths == "fixed":
        return np.full(number, workload.seq, dtype=np.int64)
    median, spread = MEDIAN_AND_SPREAD[workload.lengths]
    drawn = np.random.default_rng(workload.seed).lognormal(np.log(median), spread, number)
    return np.clip(np.rint(drawn), LEAST_TOKENS, workload.seq).astype(np.int64)


def draw_rows(workload: Workload, vocabulary: int, num_steps: int) -> EncodedRows:
    """Rows for at least so many optimizer steps, ids uniform over all but the special ones.

    Args:
        workload: How many tokens a step has, and the seed.
        vocabulary: Ids that the model has.
        num_steps: Optimizer steps.
    """
    lines = workload.lines * workload.accumulation * (num_steps + MORE_STEPS)
    number = lines
    if workload.packing:
        # Enough rows that even the shortest draws fill the lines; what is too much is not read.
        mean = float(row_lengths(workload, 4096).mean())
        number = int(np.ceil(1.1 * lines * workload.seq / mean)) + 16
    lengths = row_lengths(workload, number)
    generator = np.random.default_rng([workload.seed, 1])
    ids = generator.integers(FIRST_TOKEN, vocabulary, int(lengths.sum()), dtype=np.int32)
    starts = np.cumsum(lengths) - lengths
    prompts = np.ceil(PROMPT_SHARE * lengths).astype(np.int64)
    place = np.arange(len(ids)) - np.repeat(starts, lengths)
    return EncodedRows(
        ids, place >= np.repeat(prompts, lengths), starts, lengths, lengths - prompts
    )


def training_batches(rows: EncodedRows, workload: Workload) -> TrainingBatches:
    """The micro-batches of a measurement, cut and ordered as those of any run."""
    return TrainingBatches(
        rows,
        BatchLayout(workload.lines, workload.accumulation),
        workload.seed,
        group_by_length=True,
        pad_id=PAD_ID,
        shape=BatchShape(max_length=workload.seq, is_packed=workload.packing),
    )


def rows_of_steps(batches: TrainingBatches, num_steps: int) -> list[list[int]]:
    """The rows of each optimizer step, for a program that makes its own batches of them."""
    found: list[list[int]] = [[] for _ in range(num_steps)]
    for position in range(num_steps * batches.layout.accumulation):
        key = batches.key_at(0, position)
        found[key.step] += [int(row) for unit in batches.rows_of(key) for row in unit]
    return found


class DrawnData(LightningDataModule):
    """A data module of drawn rows, with what a ``QLoRAModule`` asks of one.

    Args:
        rows: See ``draw_rows``.
        workload: How they become micro-batches.
    """

    tokenizer = None

    def __init__(self, rows: EncodedRows, workload: Workload) -> None:
        super().__init__()
        self.rows, self.workload = rows, workload
        self.packing = self.is_packed = workload.packing

    def train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches in their order."""
        batches = training_batches(self.rows, self.workload)
        return make_loader(batches, 0, ResumableSampler(batches))

    def val_dataloader(self) -> list[Any]:
        """None are scored."""
        return []

    def packing_probe(self) -> PackingProbe:
        """See ``InstructionDataModule``."""
        return make_packing_probe(self.rows, PAD_ID, min(2, self.workload.lines))

    def decide_packing(self, is_packed: bool) -> None:
        """The model has been asked, and keeps rows apart; else it has refused."""

    def name_rows(self, row_ids: Sequence[int]) -> list[str]:
        """For messages."""
        return [f"drawn row {row}" for row in row_ids if row >= 0]
