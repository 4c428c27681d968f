"""What data hands to the model: the keys, shapes and dtypes of a batch, and nothing else.

``qlora_pl.data`` makes these, ``qlora_pl.modeling`` consumes them, and neither imports the other.
A plain dictionary rather than a class, because Lightning moves and transformers unpacks those.
"""

from __future__ import annotations

from typing import NamedTuple, NotRequired, TypedDict

from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that is not trained on (the value that torch's cross-entropy skips)."""

FILLER_ROW = -1
"""The row id of a row that only keeps ranks in step and has no trained token."""


class Batch(TypedDict):
    """Rows to train or score on, in one of two shapes, B by T tokens.

    Padded: each of the B lines is a row, padded on the right; with ``attention_mask``. Packed: each
    line is several rows one after the other, and what is left of it is one more of padding; with
    ``position_ids`` and ``document_lengths``, and without a mask: transformers keeps documents
    apart by their positions only where it is given none.
    """

    input_ids: Tensor
    """``(B, T)`` int64 token ids."""
    labels: Tensor
    """``(B, T)`` int64, the token id where it is trained, ``IGNORE_INDEX`` elsewhere; unshifted."""
    row_ids: Tensor
    """``(R,)`` int64, each row's place in its split, or ``FILLER_ROW``; R is B where padded."""
    attention_mask: NotRequired[Tensor]
    """``(B, T)`` int64, 1 for a token of the row and 0 for padding; made from lengths, not ids."""
    position_ids: NotRequired[Tensor]
    """``(B, T)`` int64, from 0 on in each document of a line, the padding at its end included."""
    document_lengths: NotRequired[Tensor]
    """``(R,)`` int64, tokens of each row of a packed batch, in the order of ``row_ids``."""
    loss_weights: NotRequired[Tensor]
    """``(B, T)`` float32, what the loss of each token as a label is multiplied by; absent: 1."""


class PackingProbe(NamedTuple):
    """The same rows in three ways, to ask a model whether it keeps packed rows apart."""

    packed: Batch
    """Equally many rows in each line."""
    padded: Batch
    apart: list[Batch]
    """One batch of one row for each row of ``packed``, in the order of ``row_ids``."""


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
