"""What data hands to the model: the keys, shapes and dtypes of a batch, and nothing else.

``qlora_pl.data`` makes these, ``qlora_pl.modeling`` consumes them, and neither imports the other.
A plain dictionary rather than a class, because Lightning moves and transformers unpacks those.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that is not trained on (the value that torch's cross-entropy skips)."""

FILLER_ROW = -1
"""The row id of a row that only keeps ranks in step and has no trained token."""


class Batch(TypedDict):
    """Rows to train or score on; B rows, padded on the right to T tokens."""

    input_ids: Tensor
    """``(B, T)`` int64 token ids."""
    attention_mask: Tensor
    """``(B, T)`` int64, 1 for a token of the row and 0 for padding; made from lengths, not ids."""
    labels: Tensor
    """``(B, T)`` int64, the token id where it is trained, ``IGNORE_INDEX`` elsewhere; unshifted."""
    row_ids: Tensor
    """``(B,)`` int64, the row's place in its split, or ``FILLER_ROW``."""


class Seq2SeqBatch(TypedDict):
    """Pairs for an encoder-decoder model; B of them, both sides padded on the right.

    S is the sources' width and T the targets'.
    """

    input_ids: Tensor
    """``(B, S)`` int64 token ids of the source."""
    attention_mask: Tensor
    """``(B, S)`` int64, 1 for a token of the source; made from lengths, not ids."""
    labels: Tensor
    """``(B, T)`` int64 token ids of the target, all trained; ``IGNORE_INDEX`` as padding."""
    decoder_attention_mask: Tensor
    """``(B, T)`` int64, 1 for a token of the target."""
    row_ids: Tensor
    """``(B,)`` int64, as in ``Batch``."""
    loss_weights: NotRequired[Tensor]
    """``(B, T)`` float32, what the loss of each token is multiplied by; absent: 1."""


class PromptBatch(TypedDict):
    """Prompts to answer; B rows, padded on the **left** so that every prompt ends at position T."""

    input_ids: Tensor
    """``(B, T)`` int64 token ids."""
    attention_mask: Tensor
    """``(B, T)`` int64, 1 for a token of the prompt."""
    row_ids: Tensor
    """``(B,)`` int64."""
    prompts: list[str]
    """What the model is asked, as rendered text."""
    references: list[str]
    """What the data set answers; empty where it says nothing."""
