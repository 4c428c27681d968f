"""What happens to a row's logits before its next token, whichever batch the row is in.

transformers counts a batch's padding among a row's own tokens (so a repetition penalty keeps an
answer from ending, where padding is the end-of-text token), and draws all rows from one generator.
Here every row has its own text and its own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_pl.modeling.answers.decoding import DecodingConfig

SEED_STRIDE = 1_000_003
"""A prime: seeds of a run and numbers of its rows seldom meet in one sum."""


class RowLogits:
    """A logits processor of transformers' ``generate`` for one batch.

    Args:
        config: How to draw.
        num_padded: Tokens of padding before each row.
        row_ids: The rows' numbers, which seed their generators.
        device: Of the logits.
    """

    def __init__(
        self,
        config: DecodingConfig,
        num_padded: Sequence[int],
        row_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        from transformers.generation import logits_process as library  # slow to import

        self._num_padded = list(num_padded)
        self._by_row: list[Any] = []
        self._by_batch: list[Any] = []
        self._device = device
        if config.repetition_penalty != 1.0:
            penalty = library.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
            self._by_row.append(penalty)
        if config.no_repeat_ngram_size:
            self._by_row.append(library.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
        self._generators: list[torch.Generator] = []
        if config.draws_rows_apart:
            self._by_batch = _warpers(library, config)
            self._generators = [generator_of(config.seed, row) for row in row_ids]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(B, T)`` ids so far and ``(B, V)`` logits -> logits whose largest is the next token.

        With beams a row is there ``num_beams`` times, one after the other.
        """
        if self._by_row:
            beams = len(scores) // len(self._num_padded)
            rows = []
            for place, row in enumerate(scores):
                own = input_ids[place, self._num_padded[place // beams] :].unsqueeze(0)
                changed = row.unsqueeze(0)
                for process in self._by_row:
                    changed = process(own, changed)
                rows.append(changed)
            scores = torch.cat(rows)
        for process in self._by_batch:
            scores = process(input_ids, scores)
        return scores + self._noise(scores) if self._generators else scores

    def _noise(self, scores: Tensor) -> Tensor:
        """Gumbel noise, with which the largest sum is a draw from the softmax of the logits."""
        draws = [
            torch.empty(scores.shape[-1]).exponential_(generator=generator)
            for generator in self._generators
        ]
        return -torch.stack(draws).log().to(self._device)


def _warpers(library: Any, config: DecodingConfig) -> list[Any]:
    """In the order that transformers applies them."""
    found: list[Any] = []
    if config.temperature != 1.0:
        found.append(library.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        found.append(library.TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        found.append(library.TopPLogitsWarper(config.top_p))
    if config.typical_p < 1.0:
        found.append(library.TypicalLogitsWarper(config.typical_p))
    return found


def generator_of(seed: int, row: int) -> torch.Generator:
    """A row's own source of random numbers, on the CPU, so that a device does not change it."""
    return torch.Generator().manual_seed((seed * SEED_STRIDE + row) % 2**63)


class RowLimits:
    """A stopping criterion: rows end at their own length, at a text, or when somebody says so.

    Args:
        decode: Ids -> text.
        num_given: Ids that every row has before its answer, padding included.
        limits: Tokens of each row's answer at most.
        stop: Texts that end an answer.
        should_stop: Asked after each token whether all are to end.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        num_given: int,
        limits: Sequence[int],
        stop: Sequence[str],
        should_stop: Callable[[], bool],
    ) -> None:
        self._decode = decode
        self._num_given = num_given
        self._limits = list(limits)
        self._stop = tuple(stop)
        self._should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """``(B, T)`` ids so far -> ``(B,)`` whether each row ends here."""
        if self._should_stop():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        beams = len(input_ids) // len(self._limits)
        num_new = input_ids.shape[1] - self._num_given
        ends = [
            num_new >= self._limits[place // beams] or self._has_stop(row)
            for place, row in enumerate(input_ids)
        ]
        return torch.tensor(ends, device=input_ids.device)

    def _has_stop(self, row: Tensor) -> bool:
        if not self._stop:
            return False
        # A token has at least one byte, so a text of n bytes lies within the last n tokens or so.
        longest = max(len(text.encode()) for text in self._stop)
        tail = row[self._num_given :][-(longest + 4) :].tolist()
        text = self._decode(tail)
        return any(stop in text for stop in self._stop)
