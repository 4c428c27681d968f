"""A conversation with a model: turns that fit into what it can read, each answered as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from qlora_pl.chat.streaming import TextStream
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.errors import DatasetFormatError
from qlora_pl.files import write_atomic
from qlora_pl.inference.loading import Model
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.decoding import DecodingConfig
from qlora_pl.modeling.generation import RowAnswer, answer_batch, context_of

TRIES_A_TURN = 1000
"""Numbers of a turn's random draws: the first answer, and each that is asked for again."""


class Chat:
    """Remembers what was said.

    Args:
        model: What answers.
        decoding: How answers are drawn.
        name: The adapter that answers, or ``base``.
        system: A system message.
    """

    def __init__(
        self, model: Model, decoding: DecodingConfig, name: str, system: str | None = None
    ) -> None:
        self.model = model
        self.decoding = decoding
        self.name = name
        self.system = system
        self.turns: list[Message] = []
        self.num_forgotten = 0
        """Of the oldest messages, which the last prompt had no room for."""
        self._tries = 0

    def ask(
        self,
        text: str,
        emit: Callable[[str], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RowAnswer:
        """Say something, and get an answer piece by piece.

        Args:
            text: What is said.
            emit: Told each piece of the answer.
            should_stop: Asked after each token whether to leave the answer as it is.

        Raises:
            DatasetFormatError: if not even this alone leaves room for an answer.
        """
        self.turns.append(Message("user", text))
        self._tries = 0
        return self._answer(emit, should_stop)

    def retry(
        self, emit: Callable[[str], None], should_stop: Callable[[], bool] = lambda: False
    ) -> RowAnswer | None:
        """Answer the last question once more, by other draws; None if nothing was asked."""
        if not self.turns:
            return None
        if self.turns[-1].role == "assistant":
            self.turns.pop()
        self._tries += 1
        return self._answer(emit, should_stop)

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns = []

    def save(self, path: Path) -> None:
        """Write the conversation as a row of ``messages``, which ``fit`` and ``generate`` read.

        Raises:
            TrainingStoppedError: if it cannot be written.
        """
        messages = [{"role": m.role, "content": m.content} for m in self._messages(self.turns)]
        write_atomic(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")

    def _messages(self, turns: list[Message]) -> list[Message]:
        return [Message("system", self.system), *turns] if self.system else turns

    def _answer(self, emit: Callable[[str], None], should_stop: Callable[[], bool]) -> RowAnswer:
        try:
            ids = self._prompt()
        except DatasetFormatError:
            self.turns.pop()
            raise
        encoder = self.model.encoder
        stream = TextStream(self.model.tokenizer.decode, emit, encoder.stop_ids, self.decoding.stop)
        given = torch.tensor([ids], device=self.model.device)
        with self.model.answering_as(None if self.name == BASE else self.name) as model:
            (answer,) = answer_batch(
                model,
                self.model.tokenizer,
                given,
                torch.ones_like(given),
                encoder.stop_ids,
                self.decoding,
                [len(self.turns) * TRIES_A_TURN + self._tries],
                should_stop,
                streamer=stream,
            )
        self.turns.append(Message("assistant", answer.text))
        return answer

    def _prompt(self) -> list[int]:
        """Ids of as many of the newest turns as leave room for a whole answer."""
        limits = [context_of(self.model.model), self.decoding.max_length]
        limit = min((one for one in limits if one), default=None)
        self.num_forgotten = 0
        while True:
            turns = self.turns[self.num_forgotten :]
            _, ids = self.model.encoder.encode_prompt(Conversation(tuple(self._messages(turns))))
            if limit is None or len(ids) + self.decoding.max_new_tokens <= limit:
                return ids
            if len(turns) > 2:  # a question and its answer
                self.num_forgotten += 2
            elif len(ids) < limit:
                return ids
            else:
                raise DatasetFormatError(
                    f"This has {len(ids)} tokens with what the template puts around it, and prompt "
                    f"and answer together may have {limit}; say it in fewer words."
                )
