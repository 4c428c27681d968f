"""``qlora-pl chat``: its flags, and what is loaded before anyone says a word."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.flags import Flags
from qlora_pl.inference.source import BASE, ModelChoice, resolve_source
from qlora_pl.modeling.decoding import DecodingConfig

DESCRIPTION = """Talk to an adapter (or a model alone), through the template it was trained with.
Ctrl-C stops an answer, Ctrl-D or /exit ends the conversation."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How the conversation goes."""

    system: str | None = None
    """A system message."""


def chat_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``chat``.

    Raises:
        QLoRAError: for a mistake in words or folders.
    """
    parser = Flags("chat", DESCRIPTION)
    parser.add_settings(ModelChoice, "which model answers")
    parser.add_settings(ChatOptions, "how the conversation goes")
    parser.add_settings(DecodingConfig, "how answers are drawn")
    given = parser.parse(words)
    choice = ModelChoice(**parser.settings(ModelChoice, given))
    decoding = DecodingConfig(**parser.settings(DecodingConfig, given))
    options = ChatOptions(**parser.settings(ChatOptions, given))
    if decoding.num_beams > 1:
        raise ConfigurationError(
            "--num-beams: a beam search knows its answer only at the end, and a chat shows it as "
            "it comes; leave it out."
        )
    # Imported here: a mistake in the flags is told at once.
    from qlora_pl.chat.conversing import Chat
    from qlora_pl.chat.terminal import talk
    from qlora_pl.inference.loading import load
    from qlora_pl.inference.machine import place_of

    source = resolve_source(choice)
    for assumed in source.assumed:
        print(f"No file says it, so this is assumed: {assumed}.", file=sys.stderr)
    model = load(source, place_of(choice), choice.cache_dir, choice.trust_remote_code)
    name = next(iter(model.adapters), BASE)
    return talk(Chat(model, decoding, name, options.system))
