"""Tokens and embedding rows: whether every token has a row, and what happens when one has not.

A row that is added is random in every program that loads the adapter, unless it travels with it; so
a vocabulary grows only when asked to, and then the new rows are trained, saved and documented.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_pl.errors import ConfigurationError


def check_vocabulary(tokenizer: Any, skeleton: nn.Module) -> None:
    """Every token must have an embedding row.

    Raises:
        ConfigurationError: if the tokenizer has more tokens than the base has rows.
    """
    rows = skeleton.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ConfigurationError(
            f"data.tokenizer: '{tokenizer.name_or_path}' has {len(tokenizer)} tokens, the base has "
            f"{rows} embedding rows; use the base's own tokenizer."
        )
