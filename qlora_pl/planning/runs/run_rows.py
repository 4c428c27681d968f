"""A run's own rows -> its largest micro-batch and its average one, where they can be read here.

Reading goes the way of training: the same data module, no trainer, no network.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlora_pl.cli import settings
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.reading.data_files import PathError, find_files
from qlora_pl.data.reading.sources import NO_ROWS
from qlora_pl.data.splits import BaseFacts
from qlora_pl.errors import QLoRAError
from qlora_pl.planning.shapes.local_files import is_model_here

READ_AT_MOST = 10 * 2**20
"""Bytes of files that are read unasked: some five seconds of encoding."""


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """What the rows of a run come to."""

    num_rows: int
    """In training."""
    rows: int
    """Lines of the largest micro-batch."""
    width: int
    """Tokens of each of its lines, padding included; with an encoder, of its sources."""
    target_width: int
    """With an encoder, tokens of each of its targets; else 0."""
    trained: int
    """Tokens of that micro-batch that are trained."""
    has_padding: bool
    """Whether its lines differ in length, so that a mask comes with them."""
    mean_tokens: float
    """Of a row, without padding."""
    mean_trained: float
    mean_pairs: float
    """Mean square of a row's length."""
    num_micro_batches: int
    """Of an epoch, on one device."""
    lengths: np.ndarray = field(repr=False)
    """``(num_rows,)`` tokens of each row."""
    trained_lengths: np.ndarray = field(repr=False)
    """``(num_rows,)`` tokens of each that are trained."""
    overlong: str = "cut"
    """``data.overlong``: what would become of a row that is longer than it may be."""

    def most_trained(self, num_rows: int) -> int:
        """Trained tokens of that many rows, at most."""
        return int(np.sort(self.trained_lengths)[-num_rows:].sum())

    def share_lost(self, length: int) -> float:
        """Share of the trained tokens that a limit of so many would take, at most.

        As if what is trained stood at the end of each row, which is where it is cut.
        """
        beyond = np.maximum(self.lengths - length, 0)
        if self.overlong == "split":
            return 0.0
        if self.overlong == "drop":
            lost = np.where(beyond > 0, self.trained_lengths, 0)
        elif self.overlong == "cut_prompt":
            lost = np.maximum(self.trained_lengths - length, 0)
        else:
            lost = np.minimum(beyond, self.trained_lengths)
        return float(lost.sum() / max(1, self.trained_lengths.sum()))


class UnreadRowsError(Exception):
    """The rows were not read; ``str(error)`` says why, as the end of a sentence."""


def read_rows(run: Any, reads_all: bool = False) -> RowFacts:
    """Read, encode and batch the training rows of a parsed run.

    Args:
        run: From ``read_runs``.
        reads_all: Also files that take longer than a person waits.

    Raises:
        UnreadRowsError: if they cannot be read here, or not soon.
    """
    _refuse_far(run, reads_all)
    given = settings(run.data) | {"num_workers": 0}
    if given["val_sources"]:  # nothing of the training rows is then taken away
        given |= {"val_sources": NO_ROWS, "val_size": 0}
    logger = logging.getLogger("qlora_pl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what reading would tell is fit's to tell
    try:
        data = InstructionDataModule(**given)
        data.base = BaseFacts.of(run.model)
        data.accumulation = run.trainer.accumulate_grad_batches or 1
        data.setup("fit")
        batches: Any = data.train_dataloader().dataset
        largest = batches[batches.largest_key(0)]
    except QLoRAError as error:
        raise UnreadRowsError(str(error).splitlines()[0].rstrip(".")) from error
    finally:
        logger.setLevel(level)
    rows = data.splits["train"].rows
    ids, labels = largest["input_ids"], largest["labels"]
    is_paired = "decoder_attention_mask" in largest
    mask = largest.get("attention_mask")
    first = 0 if is_paired else 1  # a causal row's first token is no label
    return RowFacts(
        num_rows=len(rows),
        rows=ids.shape[0],
        width=ids.shape[1],
        target_width=labels.shape[1] if is_paired else 0,
        trained=int((labels[:, first:] != -100).sum()),
        has_padding=mask is not None and not bool(mask.all()),
        mean_tokens=float(rows.lengths.mean()),
        mean_trained=float(rows.num_trained.mean()),
        mean_pairs=float((rows.lengths.astype(np.float64) ** 2).mean()),
        num_micro_batches=len(batches),
        lengths=rows.lengths.astype(np.int64),
        trained_lengths=rows.num_trained.astype(np.int64),
        overlong=run.data.overlong,
    )


def _refuse_far(run: Any, reads_all: bool) -> None:
    """What would need the network, or more time than a person waits.

    Raises:
        UnreadRowsError: naming it.
    """
    if run.data.window is not None:
        raise UnreadRowsError("data.window reads them while training goes on")
    tokenizer = run.data.tokenizer
    if not is_model_here(tokenizer, run.model.revision, run.model.cache_dir, "tokenizer.json"):
        raise UnreadRowsError(f"the tokenizer of '{tokenizer}' is not on this machine")
    size = 0
    for source in run.data.sources.sources:
        if not source.is_local and not source.is_saved:
            raise UnreadRowsError(f"'{source.name}' is not on this machine")
        try:
            files = [Path(source.path)] if source.is_saved else find_files(source.path)
        except PathError as error:
            raise UnreadRowsError(str(error).rstrip(".")) from error
        size += sum(path.stat().st_size for file in files for path in _files(file))
    if size > READ_AT_MOST and not reads_all:
        raise UnreadRowsError(
            f"their files hold {size / 2**20:,.0f} MiB, which takes a while; --read-rows reads them"
        )


def _files(path: Path) -> list[Path]:
    path = path.expanduser()
    return [inner for inner in path.rglob("*") if inner.is_file()] if path.is_dir() else [path]
