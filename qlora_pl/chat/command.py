"""``qlora-pl chat``: its flags, and what is loaded before anyone says a word."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_pl.chat.address import Login, PageOptions, free_port, login_for, require_gradio
from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.flags import Flags
from qlora_pl.inference.source import BASE, ModelChoice, resolve_source
from qlora_pl.modeling.answers.decoding import DecodingConfig

DESCRIPTION = """Talk to an adapter (or a model alone), through the template it was trained with: in
the terminal, where Ctrl-C stops an answer and Ctrl-D or /exit ends the conversation, or with --web
on a page in the browser, which Ctrl-C ends."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How the conversation goes."""

    system: str | None = None
    """A system message."""


def flags() -> Flags:
    """The command's flags."""
    parser = Flags("chat", DESCRIPTION)
    parser.add_settings(ModelChoice, "which model answers")
    parser.add_settings(ChatOptions, "how the conversation goes")
    parser.add_settings(PageOptions, "the page in the browser")
    parser.add_settings(DecodingConfig, "how answers are drawn")
    return parser


def chat_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``chat``.

    Raises:
        QLoRAError: for a mistake in words or folders.
    """
    parser = flags()
    given = parser.parse(words)
    choice = ModelChoice(**parser.settings(ModelChoice, given))
    decoding = DecodingConfig(**parser.settings(DecodingConfig, given))
    options = ChatOptions(**parser.settings(ChatOptions, given))
    if decoding.num_beams > 1:
        raise ConfigurationError(
            "--num-beams: a beam search knows its answer only at the end, and a chat shows it as "
            "it comes; leave it out."
        )
    page, login = _page(parser.settings(PageOptions, given))
    # Imported here: a mistake in the flags is told at once.
    from qlora_pl.chat.conversing import Chat
    from qlora_pl.chat.terminal import talk
    from qlora_pl.inference.loading import load
    from qlora_pl.inference.machine import place_of

    source = resolve_source(choice)
    for assumed in source.assumed:
        print(f"No file says it, so this is assumed: {assumed}.", file=sys.stderr)
    model = load(source, place_of(choice), choice.cache_dir, choice.trust_remote_code)
    if page.web:
        from qlora_pl.chat.website import open_website

        open_website(model, page, decoding, options.system, login).wait()
        return 0
    name = next(iter(model.adapters), BASE)
    return talk(Chat(model, decoding, name, options.system))


def _page(given: dict[str, Any]) -> tuple[PageOptions, Login | None]:
    """What is said about the page, all that can be wrong with it told before weights are loaded."""
    page = PageOptions(**given)
    if not page.web:
        if given:
            raise ConfigurationError(f"--{next(iter(given))}: is for the page; add --web.")
        return page, None
    require_gradio()
    login = login_for(page)
    free_port(page)
    return page, login
