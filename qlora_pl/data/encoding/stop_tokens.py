"""Whether the base knows the token that ends an answer.

A token that the base has never seen has an embedding and a row of the head that mean nothing. They
are frozen, so an adapter that is taught to end with it hardly ever does. How the rows look does not
tell: SmolLM2's working stop token lies at a cosine of 0.99 to tokens that were never trained.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qlora_pl.data.encoding.special_tokens import token_ids
from qlora_pl.data.encoding.tokenizer import load_model_config
from qlora_pl.data.templates.chat_template import ChatTemplate
from qlora_pl.data.templates.template import PromptTemplate
from qlora_pl.errors import ConfigurationError


def known_stop_tokens(
    tokenizer: Any,
    base: str,
    revision: str | None = None,
    cache_dir: str | None = None,
    grows: bool = False,
) -> frozenset[int] | None:
    """The tokens that a base ends its texts with, or may learn to; None if nothing tells.

    Args:
        tokenizer: The run's tokenizer.
        base: A folder or Hub name: its configuration and generation configuration name EOS tokens.
        revision: Of a Hub name.
        cache_dir: Of downloads.
        grows: Whether tokens without an embedding row get one, which is trained.
    """
    from transformers import GenerationConfig  # slow to import

    config = load_model_config(base, revision, cache_dir)
    if config is None:
        return None
    known = set(token_ids(getattr(config.get_text_config(), "eos_token_id", None)))
    known |= set(token_ids(getattr(config, "eos_token_id", None)))
    try:
        generation = GenerationConfig.from_pretrained(base, revision=revision, cache_dir=cache_dir)
        known |= set(token_ids(generation.eos_token_id))
    except OSError:  # it has none
        pass
    if getattr(tokenizer, "chat_template", None):
        own = ChatTemplate(tokenizer).stop
        known |= {tokenizer.convert_tokens_to_ids(own)} if own else set()
    if grows:
        known |= set(range(config.get_text_config().vocab_size, len(tokenizer)))
    return frozenset(known) or None


def check_stop_token(
    template: PromptTemplate,
    tokenizer: Any,
    base: str,
    known: Collection[int] | None,
    trained: Collection[str],
) -> None:
    """The token that ends the template's answers must be known to the base, or be trained.

    Args:
        template: Ends answers with ``stop``.
        tokenizer: The run's tokenizer.
        base: Its name, for the error.
        known: What the base ends texts with; None: nothing tells, and nothing is checked.
        trained: Tokens whose rows this run trains.

    Raises:
        ConfigurationError: naming the token, those that are known, and the remedies.
    """
    stop = template.stop or tokenizer.eos_token
    if known is None or stop in trained or tokenizer.convert_tokens_to_ids(stop) in known:
        return
    shown = ", ".join(f"'{tokenizer.convert_ids_to_tokens(token)}'" for token in sorted(known))
    raise ConfigurationError(
        f"data.template: '{template.name}' ends answers with '{stop}', which '{base}' does not "
        f"know as an end (it knows {shown}), so that a trained adapter might never stop; choose a "
        f"template that ends with one of those, or train the token: model.lora.trainable_tokens "
        f"['{stop}']."
    )
