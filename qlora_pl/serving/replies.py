"""Answers -> the objects of OpenAI's interface, whole or in pieces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_pl.modeling.answers.generation import RowAnswer
from qlora_pl.serving.rows import Ended, Piece

DONE = "data: [DONE]\n\n"
"""Ends a stream."""


class Replies:
    """The objects of one request.

    Args:
        name: Who answers.
        is_chat: Whether it is a chat or a text that is gone on with.
        prompt_tokens: Of all prompts.
        has_usage: Whether a stream ends with its usage.
    """

    def __init__(self, name: str, is_chat: bool, prompt_tokens: int, has_usage: bool) -> None:
        self._is_chat = is_chat
        self._prompt_tokens = prompt_tokens
        self._has_usage = has_usage
        self._shared = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, answers: Sequence[RowAnswer]) -> dict[str, Any]:
        """All answers in one object, in their order."""
        choices = [
            self._choice(index, finish_reason(answer), answer.text, "message")
            for index, answer in enumerate(answers)
        ]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._shared, "object": kind, "choices": choices, "usage": self.usage(answers)}

    def beginning(self, num_answers: int) -> str:
        """What a stream begins with."""
        if not self._is_chat:
            return ""
        return "".join(
            self._chunk([{**self._choice(index, None), "delta": {"role": ROLE, "content": ""}}])
            for index in range(num_answers)
        )

    def event(self, event: Piece | Ended) -> str:
        """More of an answer, or its end, as a line of a stream."""
        if isinstance(event, Piece):
            return self._chunk([self._choice(event.index, None, event.text)])
        return self._chunk([self._choice(event.index, finish_reason(event.answer))])

    def ending(self, answers: Sequence[RowAnswer]) -> str:
        """What a stream ends with."""
        if not self._has_usage:
            return DONE
        return self._chunk([], self.usage(answers)) + DONE

    def usage(self, answers: Sequence[RowAnswer]) -> dict[str, int]:
        """Tokens that were read and written, without those that ended an answer."""
        written = sum(len(answer.ids) for answer in answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self._prompt_tokens + written,
        }

    def _choice(
        self, index: int, reason: str | None, text: str | None = None, place: str = "delta"
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if not self._is_chat:
            return {**choice, "text": text or ""}
        if place == "message":
            return {**choice, "message": {"role": ROLE, "content": text, "refusal": None}}
        return {**choice, "delta": {} if text is None else {"content": text}}

    def _chunk(
        self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None = None
    ) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        chunk = {**self._shared, "object": kind, "choices": choices}
        if self._has_usage:
            chunk["usage"] = usage
        return as_line(chunk)


ROLE = "assistant"


def finish_reason(answer: RowAnswer) -> str:
    """``length``, or ``stop`` at a token or text that ends answers."""
    return "length" if answer.stop_reason == "length" else "stop"


def as_line(value: Mapping[str, Any]) -> str:
    """An object as an event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def models(names: Sequence[str], created: int) -> list[dict[str, Any]]:
    """Who can answer."""
    return [
        {"id": name, "object": "model", "created": created, "owned_by": "qlora_pl"}
        for name in names
    ]
