"""A conversation in the terminal: what is typed is asked or obeyed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qlora_pl.errors import QLoRAError
from qlora_pl.inference.source import BASE

HELP = """/reset         forget what was said
/system TEXT   another system message; without a text: none
/retry         the last answer once more
/adapter NAME  who answers: an adapter's name, or base
/save FILE     write the conversation as a line of JSON
/exit          leave"""


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
        before = chat.turns[-1:]
        answer(chat, chat.retry)
        if before == chat.turns[-1:] and before and not chat.decoding.do_sample:
            print("(A greedy answer comes again as it was; --do-sample draws.)", file=sys.stderr)
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
