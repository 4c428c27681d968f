"""The rows that a merged model and the trained one are both asked: held-out ones, or a file's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.encoder_choice import choose_encoder
from qlora_pl.data.encoding.example import EncodedExample
from qlora_pl.data.encoding.lengths import Limits, source_length
from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.data.reading.normalizing import read_conversations
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.source import ModelSource
from qlora_pl.modeling.answers.generation import context_of
from qlora_pl.modeling.base.encoder_decoder import is_encoder_decoder
from qlora_pl.modeling.folders.adapter_folder import HELD_OUT

logger = logging.getLogger(__name__)

SCORE_TOKENS = 4096
"""Trained tokens that are scored, at most."""
LONGEST = 2048
"""Tokens of a row where neither adapter nor model says how many it may have."""
CHUNK = 16
"""Rows of a file that are encoded at a time."""


@dataclass(frozen=True)
class ScoredRow:
    """A row to ask both models."""

    input_ids: Tensor
    """``(T,)``; of a pair the target alone."""
    places: Tensor
    """``(n,)`` positions whose logits are of a trained token."""
    source_ids: Tensor | None = None
    """``(S,)`` what the encoder of an encoder-decoder model reads."""

    @property
    def targets(self) -> Tensor:
        """``(n,)`` the trained tokens; a decoder's logits are of the token where they are."""
        shift = 1 if self.source_ids is None else 0
        return self.input_ids[self.places + shift]

    @property
    def num_tokens(self) -> int:
        """What a model reads."""
        return len(self.input_ids) + (0 if self.source_ids is None else len(self.source_ids))

    def beginning(self, most: int) -> ScoredRow:
        """Its first so many tokens, of which none is scored."""
        return ScoredRow(self.input_ids[:most], self.places[:0], self.source_ids)


def held_out_rows(folder: Path, most: int = SCORE_TOKENS) -> list[ScoredRow]:
    """The validation rows that lie in an adapter folder, up to so many trained tokens.

    Args:
        folder: Of an adapter of a causal model; pairs lie there with no word on where one ends.
        most: Trained tokens; the first row is taken whole.
    """
    from safetensors.numpy import load_file

    path = folder / HELD_OUT
    if not path.is_file():
        return []
    arrays = load_file(path)
    starts = arrays["starts"]
    rows = (
        _causal_row(arrays["input_ids"][begin:end], arrays["is_trained"][begin:end])
        for begin, end in pairwise(starts)
    )
    return _first_tokens(rows, most)


def rows_of_file(
    source: ModelSource,
    skeleton: nn.Module,
    path: str,
    most: int = SCORE_TOKENS,
    cache_dir: str | None = None,
) -> list[ScoredRow]:
    """A file's first rows, encoded as the adapter's training rows were.

    Args:
        source: Of the adapter: its tokenizer, template, and which tokens are trained.
        skeleton: The model without weights.
        path: In any layout that training reads; no more of it is read than is scored.
        most: Trained tokens; the first row is taken whole.
        cache_dir: Where downloads are kept.

    Raises:
        ConfigurationError: if there is no such file, or no row of it has a trained token.
        DatasetFormatError: naming a bad row by its number.
    """
    sources = RowSources.parse(path, "--data", allow_rows=False)
    if problems := sources.problems("--data"):
        raise ConfigurationError(problems)
    encoder = _training_encoder(source, skeleton, cache_dir)
    limits = Limits(max_length=_longest(source, skeleton))
    rows = _first_tokens(_encoded(sources, encoder, limits), most)
    if not rows:
        raise ConfigurationError(
            f"--data: no row of '{path}' has a token to score within {limits.max_length} tokens; "
            "name rows with answers."
        )
    return rows


def _training_encoder(source: ModelSource, skeleton: Any, cache_dir: str | None) -> Encoder:
    tokenizer = load_tokenizer(source.tokenizer, source.revision, cache_dir)
    trained = source.manifest.encoding if source.manifest is not None else {}
    is_original = source.encoder == "OriginalEncoder"
    return choose_encoder(
        "original" if is_original else "spans",
        load_template(source.template, tokenizer),
        tokenizer,
        trained.get("train_on", "answers"),
        append_eos=trained.get("append_eos", True),
        max_target_length=_longest(source, skeleton) if is_original else None,
        has_encoder=is_encoder_decoder(skeleton),
    )


def _longest(source: ModelSource, skeleton: Any) -> int:
    trained = source.manifest.max_length if source.manifest is not None else 0
    return min(n for n in (trained or LONGEST, context_of(skeleton) or LONGEST) if n)


def _encoded(sources: RowSources, encoder: Encoder, limits: Limits) -> Iterator[ScoredRow]:
    read = read_conversations(sources)
    num_cut = 0
    while chunk := [conversation for _, conversation in islice(read, CHUNK)]:
        for example in (example for rows in encoder.encode(chunk) for example in rows):
            kept = encoder.fit(example, limits)
            num_cut += any(len(part.input_ids) < len(example.input_ids) for part in kept)
            yield from (_row(part, encoder.is_paired) for part in kept)
    if num_cut:
        logger.info(
            "--data: %d rows were cut to %d tokens, as in training.", num_cut, limits.max_length
        )


def _row(example: EncodedExample, is_paired: bool) -> ScoredRow:
    if not is_paired:
        return _causal_row(example.input_ids, example.is_trained)
    begin = source_length(example)
    ids = torch.from_numpy(example.input_ids.astype(np.int64))
    places = torch.from_numpy(np.flatnonzero(example.is_trained[begin:]))
    return ScoredRow(ids[begin:], places, ids[:begin])


def _causal_row(input_ids: np.ndarray, is_trained: np.ndarray) -> ScoredRow:
    places = torch.from_numpy(np.flatnonzero(is_trained[1:]))
    return ScoredRow(torch.from_numpy(input_ids.astype(np.int64)), places)


def _first_tokens(rows: Iterator[ScoredRow], most: int) -> list[ScoredRow]:
    """Rows with a trained token, until one would not fit; the first is taken whole."""
    taken: list[ScoredRow] = []
    number = 0
    for row in rows:
        if not len(row.places):
            continue
        if taken and number + len(row.places) > most:
            break
        taken.append(row)
        number += len(row.places)
    return taken
