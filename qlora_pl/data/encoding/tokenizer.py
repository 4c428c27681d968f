"""A tokenizer that can be trained with: fast, with a padding token, and of its model's opinion."""

from __future__ import annotations

from typing import Any

from qlora_pl.data.encoding.special_tokens import repair_special_tokens
from qlora_pl.errors import ConfigurationError


def load_tokenizer(name: str, revision: str | None = None, cache_dir: str | None = None) -> Any:
    """A fast tokenizer that has a padding token, without growing its vocabulary.

    Padding reuses a token that exists (attention masks come from lengths, so its id is never seen):
    a new one would need a new row in the embedding, which no adapter saves.

    Raises:
        ConfigurationError: if the folder or Hub name has no fast tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import

    tokenizer, problem = None, None
    # The second is for machines that have mistral-common, through which transformers then reads
    # Mistral's tokenizers, without characters.
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        try:
            tokenizer = kind.from_pretrained(
                name,
                revision=revision,
                cache_dir=cache_dir,
                trust_remote_code=False,  # None asks on the terminal, and takes a "y" for a yes
            )
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and others
            problem = problem or error
        if getattr(tokenizer, "is_fast", False):
            break
    if tokenizer is None:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise ConfigurationError(
            f"data.tokenizer: no tokenizer could be read from '{name}' ({reason.rstrip('.')})."
        ) from problem
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(
            f"data.tokenizer: '{name}' has no fast tokenizer, which labels need (character "
            "offsets); convert it once with transformers and save it."
        )
    repair_special_tokens(tokenizer, load_model_config(name, revision, cache_dir))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_model_config(name: str, revision: str | None = None, cache_dir: str | None = None) -> Any:
    """The configuration of the model beside a tokenizer; None if there is none."""
    from transformers import AutoConfig  # slow to import

    try:
        return AutoConfig.from_pretrained(
            name, revision=revision, cache_dir=cache_dir, trust_remote_code=False
        )
    except Exception:  # a tokenizer alone, or a model whose code is not run for this
        return None
