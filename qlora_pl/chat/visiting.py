"""A browser tab's conversations, without the browser: who answers, and the answer as it grows.

Each tab has conversations of its own, which nobody else sees, and which end with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from qlora_pl.chat.conversing import Chat
from qlora_pl.chat.writing import Ask, Queue, Writing
from qlora_pl.data.conversation import Message
from qlora_pl.errors import ConfigurationError, QLoRAError
from qlora_pl.inference.loading import Model
from qlora_pl.modeling.answers.decoding import DecodingConfig


@dataclass(frozen=True)
class Look:
    """What a tab shows at a moment."""

    sides: list[list[Message]]
    """The conversation with each who answers, the answer as far as it is written."""
    said: str = ""
    """About it, in sentences of plain text."""
    is_refused: bool = False
    """Whether nothing was asked, for the reason that is said."""


class Visitor:
    """A tab.

    Args:
        model: What answers.
        queue: Of all tabs.
        decoding: How answers are drawn, until something else is chosen.
        names: Who answers: names of adapters, or ``base``.
    """

    def __init__(
        self, model: Model, queue: Queue, decoding: DecodingConfig, names: Sequence[str]
    ) -> None:
        self._queue = queue
        self._stop = threading.Event()
        self._is_busy = threading.Lock()
        self.chats = [Chat(model, decoding, name) for name in names]

    def choose(self, names: Sequence[str]) -> None:
        """Say who answers from now on.

        Who answered already goes on with their own conversation, who joins with the first one's.

        Raises:
            ConfigurationError: if an answer is being written.
        """
        with self._alone():
            known = {chat.name: chat for chat in self.chats}
            first = self.chats[0]
            self.chats = [known.get(name) or first.fork(name) for name in dict.fromkeys(names)]

    def ask(self, text: str, decoding: DecodingConfig, system: str | None) -> Iterator[Look]:
        """Ask everybody who answers, one after the other."""
        return self._answers(
            lambda chat, tell, is_over: chat.ask(text, tell, is_over), decoding, system, text
        )

    def retry(self, decoding: DecodingConfig, system: str | None) -> Iterator[Look]:
        """Have everybody answer the last question once more."""
        return self._answers(Chat.retry, decoding, system, None)

    def stop(self) -> None:
        """Leave the answer that is being written, and those that wait, as they are."""
        self._stop.set()

    def clear(self) -> None:
        """Forget what was said; an answer that is being written is stopped first."""
        self.stop()
        with self._is_busy:
            for chat in self.chats:
                chat.reset()

    def look(self, said: str = "") -> Look:
        """What has been said so far."""
        return Look([list(chat.turns) for chat in self.chats], said)

    def as_lines(self) -> str:
        """Every side's conversation as a line of JSON; empty if nothing was said."""
        return "".join(chat.as_line() for chat in self.chats if chat.turns)

    def _answers(
        self, ask: Ask, decoding: DecodingConfig, system: str | None, text: str | None
    ) -> Iterator[Look]:
        """Looks at an answer; or at the conversation as it was, and the reason for it."""
        try:
            with self._alone():
                self._stop.clear()
                for chat in self.chats:
                    chat.decoding, chat.system = decoding, system
                yield from self._written(ask, text)
        except QLoRAError as error:
            yield replace(self.look(str(error)), is_refused=True)

    def _written(self, ask: Ask, text: str | None) -> Iterator[Look]:
        """Looks at the sides' answers, one side after the other; all are made, or none."""
        before = [(list(chat.turns), chat.inherited) for chat in self.chats]
        sides = [chat.asking(text) for chat in self.chats]
        notes = []
        try:
            for place, chat in enumerate(self.chats):
                asked = sides[place]
                with Writing(chat, ask, self._queue, self._stop.is_set) as writing:
                    for answer, said in writing.looks():
                        written = [Message("assistant", answer)] if answer else []
                        sides[place] = [*asked, *written]
                        yield Look(list(sides), said)
                sides[place] = list(chat.turns)
                whose = f"{chat.name}: " if len(self.chats) > 1 else ""
                notes.append(f"{whose}{writing.note()}")
        except Exception:
            for chat, (turns, inherited) in zip(self.chats, before, strict=True):
                chat.turns, chat.inherited = turns, inherited
            raise
        if text is None and any(notes) and not self.chats[0].decoding.do_sample:
            notes.append("Without sampling an answer comes out the same.")
        yield self.look("\n".join(notes))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within the block nothing else is asked in this tab.

        Raises:
            ConfigurationError: if an answer is being written.
        """
        if not self._is_busy.acquire(blocking=False):
            raise ConfigurationError("An answer is being written; stop it, or wait for its end.")
        try:
            yield
        finally:
            self._is_busy.release()
