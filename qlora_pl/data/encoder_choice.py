"""Which encoder a run's rows go through, told from its settings."""

from __future__ import annotations

from typing import Any, Literal

from qlora_pl.data.encoding import Encoder, TrainOn
from qlora_pl.data.original_encoding import OriginalEncoder
from qlora_pl.data.templates import PromptTemplate
from qlora_pl.errors import ConfigurationError

Encoding = Literal["spans", "original"]


def choose_encoder(
    encoding: Encoding,
    template: PromptTemplate,
    tokenizer: Any,
    train_on: TrainOn,
    append_eos: bool,
    max_target_length: int | None,
) -> Encoder:
    """The encoder that these settings ask for.

    Raises:
        ConfigurationError: for settings that contradict each other.
    """
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
