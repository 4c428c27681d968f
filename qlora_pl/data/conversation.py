"""The one shape that every dataset is brought to, whatever its columns were called.

A format makes a ``Conversation`` from a row, a template makes text from a ``Conversation``; so n
formats and m templates need n + m functions. Plain text (continued pretraining, or a conversation
that somebody already rendered) is a ``Conversation`` too: one trained message and no template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    context: str = ""
    """What an instruction refers to (Alpaca's ``input`` column); every template has a place."""
    weight: float = 1.0
    """How much the loss of its tokens counts where they are trained; 0: read, but not learnt."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one row, oldest first."""

    messages: tuple[Message, ...]
    is_plain_text: bool = False
    """True: the single message is text to learn as it stands, without a template."""

    @classmethod
    def from_text(cls, text: str) -> Conversation:
        """A row that is text already."""
        return cls((Message("assistant", text),), is_plain_text=True)

    @property
    def prompt(self) -> Conversation:
        """Everything before the last answer: what a model is asked when it is evaluated."""
        last = self.messages[-1]
        return Conversation(self.messages[:-1] if last.role == "assistant" else self.messages)

    @property
    def reference(self) -> str:
        """The last answer, or an empty string when the row ends with a question."""
        last = self.messages[-1]
        return last.content if last.role == "assistant" else ""

    def problem(self) -> str | None:
        """One clause about why this cannot be learnt from, or None.

        Checked for every row, since a single empty answer teaches a model to say nothing.
        """
        if not self.messages:
            return "it has no messages"
        if self.messages[-1].role != "assistant":
            return "it ends with a question, so there is nothing to learn"
        if self.is_plain_text:
            return None if self.messages[0].content.strip() else "its text is empty"
        expected = "user"
        for place, message in enumerate(self.messages):
            if message.role == "system" and place == 0:
                continue
            if message.role == "system":
                return f"message {place + 1} is from 'system', which only the first may be"
            if message.role != expected:
                return f"message {place + 1} is from '{message.role}', expected '{expected}'"
            if message.role == "assistant" and not message.content.strip():
                return f"its answer (message {place + 1}) is empty"
            expected = "assistant" if expected == "user" else "user"
        if not any(message.weight for message in self.messages if message.role == "assistant"):
            return "every answer has weight 0, so there is nothing to learn"
        return None
