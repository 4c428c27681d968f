"""One row of tokens, and everything about it that is counted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qlora_pl.batch import IGNORE_INDEX


class EncodedExample(NamedTuple):
    """One row of tokens, of any length."""

    input_ids: np.ndarray
    """``(T,)`` int32."""
    is_trained: np.ndarray
    """``(T,)`` bool; True where the token is a label."""
    is_answer: np.ndarray
    """``(T,)`` bool; True where the model is to write it, trained or not."""
    num_bos: int = 0
    """Beginning-of-text tokens at its start, whoever put them there; nothing can predict them."""
    weights: np.ndarray | None = None
    """``(T,)`` float32, how much each trained token counts; None: all the same."""
    num_unstopped: int = 0
    """Trained answers that do not end in a stop token."""
    num_straddling: int = 0
    """Tokens that cover the end of a prompt and the start of its answer at once."""
    num_trimmed: int = 0
    """Messages whose first or last spaces the template left out."""
    spells_control: bool = False
    """Whether its own text spells a control token."""

    @property
    def labels(self) -> np.ndarray:
        """``(T,)`` int64, ``IGNORE_INDEX`` where nothing is trained."""
        return np.where(self.is_trained, self.input_ids, IGNORE_INDEX).astype(np.int64)

    @property
    def num_trained(self) -> int:
        """Tokens that are labels."""
        return int(np.count_nonzero(self.is_trained))

    @property
    def is_worth_training(self) -> bool:
        """Whether a token of an answer is trained; questions alone teach nothing that was asked."""
        return bool((self.is_answer & self.is_trained).any())

    def part(self, chosen: np.ndarray | slice) -> EncodedExample:
        """Some of its tokens."""
        return self._replace(
            input_ids=self.input_ids[chosen],
            is_trained=self.is_trained[chosen],
            is_answer=self.is_answer[chosen],
            weights=None if self.weights is None else self.weights[chosen],
        )


class TracedExample(NamedTuple):
    """A row of tokens with the text that it was made of."""

    example: EncodedExample
    text: str
    spans: list[tuple[int, int]]
    """First character and end of each token; tokens that were put before the text cover none."""
