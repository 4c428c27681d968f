"""A tokenizer's special tokens, held against the configuration of the model beside it.

A wrong id trains silently: early LLaMA conversions name no EOS, or one that the model never saw,
and an adapter that is taught to end with it never ends.
"""

from __future__ import annotations

import logging
from typing import Any

from qlora_pl.errors import ConfigurationError

logger = logging.getLogger(__name__)

ROLES = ("bos_token", "eos_token")


def repair_special_tokens(tokenizer: Any, config: Any) -> None:
    """Set roles that the tokenizer leaves empty and the model's configuration names.

    Args:
        tokenizer: A fast transformers tokenizer; changed in place, its vocabulary is not.
        config: The model's configuration, or None if there is none beside the tokenizer.

    Raises:
        ConfigurationError: if the configuration names a token that cannot have the role.
    """
    text_config = config.get_text_config() if config is not None else None
    for role in ROLES:
        theirs = token_ids(getattr(text_config, f"{role}_id", None))
        ours = getattr(tokenizer, f"{role}_id")
        if not theirs or ours in theirs:
            continue
        if ours is not None and getattr(tokenizer, role) and ours != tokenizer.unk_token_id:
            logger.warning(
                "'%s' says %s %d (%s), the model's config.json says %s; the tokenizer's is used.",
                tokenizer.name_or_path,
                role,
                ours,
                getattr(tokenizer, role),
                ", ".join(str(i) for i in theirs),
            )
            continue
        token = tokenizer.convert_ids_to_tokens(theirs[0]) if theirs[0] < len(tokenizer) else None
        other = next(getattr(tokenizer, r) for r in ROLES if r != role)
        if not token or token in (tokenizer.unk_token, other) or not _is_marker(token):
            raise ConfigurationError(
                f"data.tokenizer: '{tokenizer.name_or_path}' has no {role}, and the model's "
                f"config.json says {theirs[0]}, which is {token!r}; name another conversion "
                "of the same model."
            )
        setattr(tokenizer, role, token)
        logger.warning(
            "'%s' has no %s; set to %s (%d), as the model's config.json says.",
            tokenizer.name_or_path,
            role,
            token,
            theirs[0],
        )


def token_ids(value: Any) -> list[int]:
    """What a configuration says of a role: no id, one, or several."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and i >= 0]


def _is_marker(token: str) -> bool:
    # "<s>", "</s>", "<|endoftext|>", "[EOS]": nothing that a person would write as a word
    return token[:1] + token[-1:] in ("<>", "[]")
