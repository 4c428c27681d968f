"""Training rows a window at a time, for sources too large to be read before training.

Lightning's epochs are the windows: window k is the rows from k times its size on, its order is a
function of (seed, k), and a run that is resumed in it reads up to it again, without encoding. What
this gives up against reading everything first: rows are sorted and packed within a window alone,
rows that come later are judged only when they come, and a source's end is known only when it is
reached. The first window is judged before any weight is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.normalizing import (
    MAX_SKIPPED_RATIO,
    MIN_SKIPPED_ROWS,
    ReadingReport,
)
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.audit import DataReport, check_split
from qlora_pl.data.rows.chunks import ChunkEncoder, Read
from qlora_pl.data.rows.preparation import EncodedSplit, Source, prepare_reads, sum_padded
from qlora_pl.data.splits import first_rows, limits_of
from qlora_pl.errors import ConfigurationError, DatasetFormatError, QLoRAError

logger = logging.getLogger(__name__)

KEY = "data.sources"


class Windows:
    """The windows of a source, in any order, cheapest one after another.

    Args:
        source: What is read.
        encoder: Renders and tokenises.
        limits: How long rows may be, and how much may be lost to that.
        size: Rows that are read for a window.
        num_val: Rows at the beginning that validate and are in no window.
    """

    def __init__(
        self, source: Source, encoder: Encoder, limits: Limits, size: int, num_val: int
    ) -> None:
        self._source = source
        self._encode = ChunkEncoder(encoder, limits, skips=source.on_error == "skip")
        self._size = size
        self._num_val = num_val
        self._total, self._needed = DataReport(), np.zeros(0, np.int64)
        self._stream: Iterator[Read] = iter(())
        self._reading = ReadingReport()
        self._next = -1
        self._num_windows: int | None = None

    def first_splits(self, data: Any) -> dict[str, EncodedSplit]:
        """The first window, and the validation rows of a data module."""
        train = self.read(0)
        if data.val_sources:
            val = data.read_rows(data.val_sources, "data.val_sources")
        else:
            val = self.validation() if self._num_val else train.select([])
        return {"train": train, "val": first_rows(val, data.max_val_samples)}

    def validation(self) -> EncodedSplit:
        """The rows before the first window.

        Raises:
            ConfigurationError, DatasetFormatError: if they are not worth validating on.
        """
        reads = list(islice(self._source.conversations(ReadingReport()), self._num_val))
        split, needed = prepare_reads(reads, self._encode)
        check_split(split.report, needed, self._encode.limits, KEY, self._template)
        return split

    def read(self, number: int) -> EncodedSplit:
        """The rows of a window; after the last one the first follows again.

        Raises:
            ConfigurationError, DatasetFormatError: if its rows, or those so far, are not worth
                training on.
        """
        reads = self._reads(number)
        if not reads:
            raise ConfigurationError(f"{KEY}: no rows are left to train on.")
        split, needed = prepare_reads(reads, self._encode)
        self._total.add(split.report)
        self._needed = sum_padded(self._needed, needed)
        if not len(split.rows):
            raise ConfigurationError(
                f"{KEY}: none of the {len(reads)} rows of window {number + 1} ({reads[0][0]} to "
                f"{reads[-1][0]}) can be trained on; raise data.max_length or data.window."
            )
        check_split(self._total, self._needed, self._encode.limits, KEY, self._template)
        logger.info("window %d (%s to %s): %s", number + 1, reads[0][0], reads[-1][0], split.report)
        return split

    @property
    def _template(self) -> str:
        return self._encode.encoder.template.name

    def _reads(self, number: int) -> list[Read]:
        if self._num_windows is not None:
            number %= self._num_windows
        if number != self._next:
            self._reading = ReadingReport()
            self._stream = self._source.conversations(self._reading)
            before = self._num_val + number * self._size
            num_read = sum(1 for _ in self._guarded(before))
            if num_read < before:  # the source is shorter than that: so many windows are one pass
                self._num_windows = max(1, -(-(num_read - self._num_val) // self._size))
                self._next = -1
                return self._reads(number)
        reads = list(self._guarded(self._size))
        self._refuse_many_bad_rows()
        if not reads and number:
            self._num_windows, self._next = number, -1
            return self._reads(number)
        self._next = number + 1
        return reads

    def _refuse_many_bad_rows(self) -> None:
        num_bad = sum(self._reading.num_skipped.values())
        total = num_bad + sum(self._reading.num_rows.values())
        if num_bad >= MIN_SKIPPED_ROWS and num_bad > MAX_SKIPPED_RATIO * total:
            raise DatasetFormatError(
                f"{KEY}: {num_bad:,} of the {total:,} rows so far are bad, and at most "
                f"{MAX_SKIPPED_RATIO:.1%} may be left out; the first: {self._reading.skipped[0]}"
            )

    def _guarded(self, count: int) -> Iterator[Read]:
        last = "its beginning"
        try:
            for read in islice(self._stream, count):
                last = str(read[0])
                yield read
        except QLoRAError:
            raise
        except Exception as error:  # a connection that broke raises whatever its library likes
            raise DatasetFormatError(
                f"{KEY}: reading stopped after {last} ({str(error) or type(error).__name__}); "
                "start again with --ckpt_path last."
            ) from error


def open_windows(data: Any, size: int) -> Windows:
    """The windows of a data module whose encoder is there, and its trainer made to ask for them.

    Raises:
        ConfigurationError: for settings that contradict windows.
    """
    if (trainer := data.trainer) is not None:
        if problems := window_problems(data, trainer.max_steps, trainer.max_epochs):
            raise ConfigurationError(problems)
        trainer.reload_dataloaders_every_n_epochs = 1
    num_val = 0 if data.val_sources else int(data.val_size)
    source = Source(data.sources, data.on_error)
    return Windows(source, data.encoder, limits_of(data), size, num_val)


def window_problems(data: Any, max_steps: int, max_epochs: int | None) -> list[str]:
    """One sentence for each setting of a data module that windows cannot have."""
    sources: RowSources = data.sources
    problems = []
    if max_steps == -1:
        problems.append(
            "trainer.max_steps: data.window does not know how many rows there are; set it."
        )
    if max_epochs not in (None, -1):
        problems.append(
            "trainer.max_epochs: with data.window an epoch is a window; set max_steps instead."
        )
    if not data.val_sources and not isinstance(data.val_size, int):
        problems.append(
            f"data.val_size: a share of {data.val_size} is of rows that data.window has not read; "
            "write a whole number for the first rows, or name data.val_sources."
        )
    if any(source.weight != 1 for source in sources.sources):
        problems.append("data.sources: weight needs all rows at once; remove it, or data.window.")
    if data.max_train_samples is not None:
        problems.append("data.max_train_samples: set the limit of a source instead, or no window.")
    return problems
