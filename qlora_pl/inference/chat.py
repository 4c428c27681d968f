"""``qlora-pl chat``: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError, QLoRAError
from qlora_pl.inference.flags import Flags
from qlora_pl.inference.source import BASE, ModelChoice, resolve_source
from qlora_pl.modeling.decoding import DecodingConfig

DESCRIPTION = """Talk to an adapter (or a model alone), through the template it was trained with.
Ctrl-C stops an answer, Ctrl-D or /exit ends the conversation."""
HELP = """/reset         forget what was said
/system TEXT   another system message; without a text: none
/retry         the last answer once more
/adapter NAME  who answers: an adapter's name, or base
/save FILE     write the conversation as a line of JSON
/exit          leave"""


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
    from qlora_pl.inference.conversing import Chat
    from qlora_pl.inference.loading import load
    from qlora_pl.inference.machine import best_device

    source = resolve_source(choice)
    for assumed in source.assumed:
        print(f"No file says it, so this is assumed: {assumed}.", file=sys.stderr)
    model = load(source, best_device(), choice.cache_dir, choice.trust_remote_code)
    name = next(iter(model.adapters), BASE)
    return talk(Chat(model, decoding, name, options.system))


def talk(chat: Any) -> int:
    """Ask, answer, and obey commands, until there is nothing more to read."""
    if sys.stdin.isatty():
        print(f"{chat.name} answers; /help shows the commands.")
    for line in lines():
        try:
            if line.startswith("/"):
                if not obey(chat, line):
                    return 0
            elif line.strip():
                answer(chat, partial(chat.ask, line))
        except QLoRAError as error:
            print(f"qlora-pl: {error}", file=sys.stderr)
    return 0


def lines() -> Iterator[str]:
    """What is typed; the end of input or Ctrl-C at the prompt ends it."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return


def answer(chat: Any, ask: Callable[[Callable[[str], None], Callable[[], bool]], Any]) -> None:
    """Print an answer as it comes; Ctrl-C stops it, and not the program."""
    with stopped_by_interrupt() as is_stopped:
        found = ask(lambda piece: print(piece, end="", flush=True), is_stopped)
    print()
    if chat.num_forgotten:
        print(
            f"(The oldest {chat.num_forgotten} messages had no room and were left out.)",
            file=sys.stderr,
        )
    if found is not None and found.stop_reason == "length":
        print("(Cut at --max-new-tokens.)", file=sys.stderr)


@contextmanager
def stopped_by_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed within the block."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def obey(chat: Any, line: str) -> bool:
    """Do what a command says; False if it says to leave."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        chat.reset()
    elif command == "/system":
        chat.system = rest or None
        chat.reset()
    elif command == "/retry":
        answer(chat, chat.retry)
    elif command == "/adapter":
        names = [*chat.model.adapters, BASE]
        if rest not in names:
            print(f"There are {', '.join(names)}.", file=sys.stderr)
        else:
            chat.name = rest
    elif command == "/save" and rest:
        chat.save(Path(rest).expanduser())
        print(f"Saved to {rest}.", file=sys.stderr)
    else:
        print(HELP, file=sys.stderr)
    return True
