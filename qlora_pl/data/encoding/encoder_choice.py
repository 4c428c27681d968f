"""Which encoder a run's rows go through, told from its settings."""

from __future__ import annotations

from typing import Any, Literal

from qlora_pl.data.encoding.encoder import Encoder, TrainOn
from qlora_pl.data.encoding.lengths import Overlong
from qlora_pl.data.encoding.original_encoding import OriginalEncoder
from qlora_pl.data.encoding.seq2seq import Seq2SeqEncoder
from qlora_pl.data.templates.template import PromptTemplate
from qlora_pl.errors import ConfigurationError

Encoding = Literal["spans", "original"]
PAIR_POLICIES = ("cut", "drop", "error")
"""What may become of a pair that is too long."""


def choose_encoder(
    encoding: Encoding,
    template: PromptTemplate,
    tokenizer: Any,
    train_on: TrainOn,
    append_eos: bool,
    max_target_length: int | None,
    overlong: Overlong = "cut",
    has_encoder: bool = False,
) -> Encoder:
    """The encoder that these settings ask for, and the model needs.

    Args:
        encoding: How causal models' rows are encoded.
        template: Renders conversations.
        tokenizer: A fast transformers tokenizer.
        train_on: See ``Encoder``.
        append_eos: See ``Encoder``.
        max_target_length: The limit of answers that have one of their own.
        overlong: What happens to a longer row.
        has_encoder: Whether the model is an encoder-decoder model.

    Raises:
        ConfigurationError: for settings that contradict each other.
    """
    if has_encoder:
        if encoding == "original":
            raise ConfigurationError(
                "data.encoding: original is for causal models, and this one has an encoder; set it "
                "to spans."
            )
        if overlong not in PAIR_POLICIES:
            raise ConfigurationError(
                f"data.overlong: {overlong} is not for pairs of a question and its answer; "
                f"choose {', '.join(PAIR_POLICIES[:-1])} or {PAIR_POLICIES[-1]}."
            )
        return Seq2SeqEncoder(template, tokenizer, train_on)
    if encoding == "original":
        if max_target_length is None:
            raise ConfigurationError(
                "data.max_target_length: encoding 'original' cuts answers to a limit of their own; "
                "set it (qlora.py's --target_max_len, 256 by default)."
            )
        return OriginalEncoder(template, tokenizer, train_on, append_eos)
    if max_target_length is not None:
        raise ConfigurationError(
            "data.max_target_length: a question and its answer share data.max_length; remove it, "
            "or set data.encoding: original."
        )
    return Encoder(template, tokenizer, train_on, append_eos)
