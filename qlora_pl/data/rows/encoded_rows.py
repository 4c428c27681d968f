"""Encoded rows in flat arrays, in memory or mapped from a file, a few bytes a token.

Selections share the tokens: a split, a shuffle or a limit costs a few numbers a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.encoding.example import EncodedExample

ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class EncodedRows:
    """Many rows; row i is the tokens ``[starts[i], starts[i] + lengths[i])``."""

    input_ids: np.ndarray
    """``(num_tokens,)`` int32, of these rows and maybe of others."""
    is_trained: np.ndarray
    """``(num_tokens,)`` bool."""
    starts: np.ndarray
    """``(num_rows,)`` int64."""
    lengths: np.ndarray
    """``(num_rows,)`` int64, tokens of each row."""
    num_trained: np.ndarray
    """``(num_rows,)`` int64, trained tokens of each row."""
    token_weights: np.ndarray | None = None
    """``(num_tokens,)`` float32, how much each trained token counts; None: all the same."""

    @classmethod
    def from_examples(cls, examples: Iterable[EncodedExample]) -> EncodedRows:
        """Concatenate examples, in order."""
        rows = list(examples)
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        return cls(
            concatenated([row.input_ids for row in rows], np.int32),
            concatenated([row.is_trained for row in rows], bool),
            np.cumsum(lengths) - lengths,
            lengths,
            np.array([row.num_trained for row in rows], dtype=np.int64),
            concatenated_weights(rows),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """``(input_ids, labels)`` of a row, ``(T,)`` int64 each."""
        span = self._span(row)
        ids = self.input_ids[span].astype(np.int64)
        return ids, np.where(self.is_trained[span], ids, IGNORE_INDEX)

    def weights(self, row: int) -> np.ndarray | None:
        """``(T,)`` float32, how much each token of a row counts; None: all trained ones alike."""
        return None if self.token_weights is None else self.token_weights[self._span(row)]

    def _span(self, row: int) -> slice:
        start = int(self.starts[row])
        return slice(start, start + int(self.lengths[row]))

    def select(self, rows: Sequence[int] | np.ndarray) -> EncodedRows:
        """These rows, in this order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return EncodedRows(
            self.input_ids,
            self.is_trained,
            self.starts[chosen],
            self.lengths[chosen],
            self.num_trained[chosen],
            self.token_weights,
        )

    def compact(self) -> EncodedRows:
        """The same rows with tokens of their own, one after another."""
        return EncodedRows(
            concatenated([self.input_ids[self._span(row)] for row in range(len(self))], np.int32),
            concatenated([self.is_trained[self._span(row)] for row in range(len(self))], bool),
            np.cumsum(self.lengths) - self.lengths,
            self.lengths,
            self.num_trained,
            None
            if self.token_weights is None
            else concatenated(
                [self.token_weights[self._span(row)] for row in range(len(self))], np.float32
            ),
        )

    def fingerprint(self) -> str:
        """SHA-256 of ids, labels and boundaries: what a run trained on, whatever its file name."""
        return self._digest

    @cached_property
    def _digest(self) -> str:  # every save asks for it
        digest = hashlib.sha256()
        for some in self._blocks():
            digest.update(some.lengths.tobytes())
            digest.update(some.input_ids.tobytes())
            digest.update(some.is_trained.tobytes())
            if some.token_weights is not None:
                digest.update(some.token_weights.tobytes())
        return digest.hexdigest()

    def _blocks(self) -> Iterator[EncodedRows]:
        for start in range(0, len(self), ROWS_AT_A_TIME):
            yield self.select(range(start, min(start + ROWS_AT_A_TIME, len(self)))).compact()


def concatenated(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """One array of them all; an empty one of none."""
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def concatenated_weights(examples: Sequence[EncodedExample]) -> np.ndarray | None:
    """``(num_tokens,)`` float32 of the examples' weights; None if every trained token counts 1."""
    if all(example.weights is None for example in examples):
        return None
    return concatenated(
        [
            example.is_trained.astype(np.float32) if example.weights is None else example.weights
            for example in examples
        ],
        np.float32,
    )
