"""An answer that is written in a thread of its own when its turn has come, and looked at meanwhile.

One model answers everybody, one at a time in the order they asked: which adapter is in use is a
state of the model.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from qlora_pl.chat.conversing import Chat
from qlora_pl.modeling.answers.generation import RowAnswer

REFRESH_SECONDS = 0.05
"""Between two looks at an answer: oftener than anyone reads, seldom enough to cost nothing."""

Ask = Callable[[Chat, Callable[[str], None], Callable[[], bool]], RowAnswer | None]
"""``Chat.ask`` or ``Chat.retry``, with whom to tell each piece and whom to ask whether to stop."""


class Queue:
    """Lets one at a time to the model, in the order they came."""

    def __init__(self) -> None:
        self._tickets: deque[object] = deque()
        self._lock = threading.Lock()

    def join(self) -> object:
        """Take a place at the end; returns the ticket for it."""
        ticket = object()
        with self._lock:
            self._tickets.append(ticket)
        return ticket

    def num_before(self, ticket: object) -> int:
        """Tickets whose turn comes first; 0: it is this one's, or was."""
        with self._lock:
            return self._tickets.index(ticket) if ticket in self._tickets else 0

    def leave(self, ticket: object) -> None:
        """Give a place up, whether or not its turn had come."""
        with self._lock:
            self._tickets.remove(ticket)


class Writing:
    """An answer, from its place in the queue to its end, within a ``with`` block.

    Leaving the block early stops it, and waits until the model is free for others.

    Args:
        chat: Who answers.
        ask: What is asked of it.
        queue: Of the model.
        should_stop: Asked after each token, and while it waits, whether to leave it at that.
    """

    def __init__(self, chat: Chat, ask: Ask, queue: Queue, should_stop: Callable[[], bool]) -> None:
        self._chat = chat
        self._ask = ask
        self._queue = queue
        self._should_stop = should_stop
        self._is_left = False
        self._text = ""
        self._ticket = queue.join()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._answer: RowAnswer | None = None
        self._error: Exception | None = None
        self._seconds = 0.0

    def __enter__(self) -> Writing:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_left = True
        self._thread.join()

    def looks(self) -> Iterator[tuple[str, str]]:
        """The answer so far and what it waits for, each time that either has changed.

        Raises:
            Exception: what ended the answer before its end.
        """
        shown = None
        while self._thread.is_alive():
            look = self._text, _waits_for(self._queue.num_before(self._ticket))
            if look != shown:
                shown = look
                yield look
            self._thread.join(REFRESH_SECONDS)
        if self._error is not None:
            raise self._error

    def note(self) -> str:
        """How an answer came to its end, in sentences; empty where nothing was asked."""
        answer, chat = self._answer, self._chat
        if answer is None:
            return ""
        notes = [f"{len(answer.ids)} tokens in {self._seconds:.1f} s."]
        if answer.stop_reason == "length":
            notes.append("Cut at the length that was asked for.")
        if answer.stop_reason == "interrupted":
            notes.append("Stopped.")
        if chat.num_forgotten:
            notes.append(f"The oldest {chat.num_forgotten} messages had no room and were left out.")
        return " ".join(notes)

    def _write(self) -> None:
        try:
            while self._queue.num_before(self._ticket) and not self._is_over():
                time.sleep(REFRESH_SECONDS)
            started = time.perf_counter()
            self._answer = self._ask(self._chat, self._tell, self._is_over)
            self._seconds = time.perf_counter() - started
        except Exception as error:  # told to whoever looks, in another thread
            self._error = error
        finally:
            self._queue.leave(self._ticket)

    def _tell(self, piece: str) -> None:
        self._text += piece

    def _is_over(self) -> bool:
        return self._is_left or self._should_stop()


def _waits_for(num_before: int) -> str:
    if not num_before:
        return ""
    others = "one other answer" if num_before == 1 else f"{num_before} other answers"
    return f"Waiting for {others}."
