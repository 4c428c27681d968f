"""Which rows train, validate and test, and the encoder that all of them go through."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_pl.data.batches.ordering import keyed_generator
from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.encoder_choice import choose_encoder
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.encoding.stop_tokens import check_stop_token, known_stop_tokens
from qlora_pl.data.encoding.tokenizer import load_model_config, load_tokenizer
from qlora_pl.data.reading.readers import hub_splits
from qlora_pl.data.reading.sources import NO_ROWS, RowSources
from qlora_pl.data.rows.preparation import EncodedSplit, prepare_split
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import ConfigurationError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What data has to know of the model."""

    name: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    trains_all: bool = False
    """Whether every weight is trained, so that any token can be learnt."""
    trainable_tokens: tuple[str, ...] = ()
    grows_vocabulary: bool = False

    @classmethod
    def of(cls, module: Any) -> BaseFacts:
        """Of a ``QLoRAModule``; None: nothing is known."""
        lora = getattr(module, "lora", None)
        return cls(
            name=getattr(module, "model_name_or_path", None),
            revision=getattr(module, "revision", None),
            cache_dir=getattr(module, "cache_dir", None),
            trains_all=getattr(lora, "method", "") == "none",
            trainable_tokens=tuple(getattr(lora, "trainable_tokens", ())),
            grows_vocabulary=bool(getattr(module, "grow_vocabulary", False)),
        )


def prepare_encoder(settings: Any, base: BaseFacts) -> Encoder:
    """The tokenizer, template and encoder of a data module's settings.

    Raises:
        ConfigurationError: if one cannot be had, or an answer would end in a token that the base
            does not know.
    """
    name = settings.tokenizer_name or base.name
    if name is None:
        raise ConfigurationError("data.tokenizer: name a tokenizer (a folder or Hub name).")
    # The revision is a commit of the model's repository, which no other has.
    revision = base.revision if name == base.name else None
    tokenizer = load_tokenizer(name, revision, base.cache_dir)
    template = load_template(settings.chosen_template, tokenizer)
    encoder = choose_encoder(
        settings.encoding,
        template,
        tokenizer,
        settings.train_on,
        settings.append_eos,
        settings.max_target_length,
        settings.overlong,
        has_encoder=_has_encoder(base, name),
    )
    if not base.trains_all and not encoder.is_paired:  # whose answers all end in EOS
        model = base.name or name
        known = known_stop_tokens(
            tokenizer, model, base.revision, base.cache_dir, base.grows_vocabulary
        )
        check_stop_token(template, tokenizer, model, known, base.trainable_tokens)
    return encoder


def _has_encoder(base: BaseFacts, tokenizer: str) -> bool:
    config = load_model_config(base.name or tokenizer, base.revision, base.cache_dir)
    return bool(getattr(config, "is_encoder_decoder", False))


def read_split(
    settings: Any, encoder: Encoder, base: BaseFacts, sources: RowSources, key: str
) -> EncodedSplit:
    """The rows of these sources, encoded and checked; says what became of them."""
    split = prepare_split(
        sources,
        encoder,
        limits_of(settings),
        key,
        settings.reading.folder,
        settings.encoding_processes,
        settings.on_error,
    )
    logger.info("%s: %s", key, split.report)  # what was cut or dropped; parts do not know it
    if not encoder.is_paired:
        _warn_of_positions(settings, base, int(split.rows.lengths.max(initial=0)), key)
    return split


def _warn_of_positions(settings: Any, base: BaseFacts, longest: int, key: str) -> None:
    """Most bases go on past their last position without an error, and hardly understand it."""
    name = base.name or settings.tokenizer_name
    config = load_model_config(name, base.revision, base.cache_dir)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < longest:
        logger.warning(
            "%s: the longest row has %d tokens, and '%s' knows %d positions "
            "(max_position_embeddings); lower data.max_length, unless its positions are scaled.",
            key,
            longest,
            name,
            positions,
        )


def limits_of(settings: Any) -> Limits:
    """How long rows may be by a data module's settings, and how much may be lost to that."""
    return Limits(
        max_length=settings.max_length,
        max_target_length=settings.max_target_length,
        overlong=settings.overlong,
        max_lost_ratio=settings.max_lost_ratio,
    )


def hub_split(sources: RowSources, names: Sequence[str]) -> RowSources:
    """The first of these splits that a Hub dataset of the training sources has, or nothing."""
    for source in sources.sources:
        for name in hub_splits(source):
            # "train+validation" and "validation[:500]" name splits that are trained on
            if name in names and name not in re.findall(r"\w+", source.split):
                return RowSources((source.of_split(name),))
    return NO_ROWS


def split_off(
    split: EncodedSplit, val_size: int | float, val_seed: int
) -> tuple[EncodedSplit, EncodedSplit]:
    """Training and validation rows; which is which depends on ``val_seed`` and nothing else.

    Raises:
        ConfigurationError: if none would be left to train on.
    """
    conversation_of = split.conversations.of_row
    names = np.unique(conversation_of)  # a conversation's rows stay together
    num_val = val_size
    if isinstance(num_val, float):
        num_val = max(1, round(len(names) * num_val)) if num_val > 0 else 0
    if num_val >= len(names):
        raise ConfigurationError(
            f"data.val_size: {val_size} leaves none of the {len(names)} rows to train on."
        )
    order = keyed_generator(val_seed, 0).permutation(len(names))
    is_val = np.isin(conversation_of, names[order[:num_val]])
    return split.select(np.flatnonzero(~is_val)), split.select(np.flatnonzero(is_val))


def first_rows(split: EncodedSplit, limit: int | None) -> EncodedSplit:
    """The first so many rows; None: all."""
    return split if limit is None or limit >= len(split.rows) else split.select(range(limit))


def prompts_of(
    split: EncodedSplit, encoder: Encoder
) -> tuple[list[tuple[str, list[int]]], list[str]]:
    """What each conversation of a split asks, as text and ids, and what it answers.

    Raises:
        ConfigurationError: if there are none, or they are plain text.
    """
    if not len(split.rows):
        raise ConfigurationError(
            "data.val_size: 0 leaves no validation rows to answer; name data.val_sources."
        )
    conversations = [c for c in split.conversations.each() if not c.is_plain_text]
    if not conversations:
        raise ConfigurationError(
            "data.val_sources: the validation rows are plain text, which has no prompts to answer."
        )
    prompts = [encoder.encode_prompt(c.prompt) for c in conversations]
    return prompts, [c.reference for c in conversations]


def multiplicity(split: EncodedSplit, sources: RowSources) -> np.ndarray | None:
    """``(num_rows,)`` float64: how often an epoch uses each row; None: each of them once."""
    weights = np.array([source.weight for source in sources.sources], dtype=np.float64)
    if (weights == 1).all():
        return None
    return weights[split.places.source_numbers()]
