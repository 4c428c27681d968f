"""A conversation with a model: turns that fit into what it can read, each answered as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from qlora_pl.chat.streaming import UNFINISHED, TextStream
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.errors import DatasetFormatError, HardwareError
from qlora_pl.files import write_atomic
from qlora_pl.inference.loading import Model
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import RowAnswer, answer_batch, context_of

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
        self.inherited: list[str] = []
        """Who went on with each of the first turns, before this one took over."""
        self._tries = 0

    def ask(
        self,
        text: str,
        emit: Callable[[str], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RowAnswer:
        """Say something, and get an answer piece by piece.

        A question before it that was left without an answer is forgotten: templates know a
        question after an answer only.

        Args:
            text: What is said.
            emit: Told each piece of the answer.
            should_stop: Asked before and after each token whether to leave the answer as it is.

        Raises:
            DatasetFormatError: if not even this alone leaves room for an answer.
            HardwareError: if the conversation does not fit into memory.
        """
        self._tries = 0
        return self._answer(self.asking(text), emit, should_stop)

    def retry(
        self, emit: Callable[[str], None], should_stop: Callable[[], bool] = lambda: False
    ) -> RowAnswer | None:
        """Answer the last question once more, by other draws; None if nothing was asked.

        Raises:
            DatasetFormatError: if the question no longer leaves room for an answer.
            HardwareError: if the conversation does not fit into memory.
        """
        if not self.turns:
            return None
        self._tries += 1
        return self._answer(self.asking(None), emit, should_stop)

    def asking(self, text: str | None) -> list[Message]:
        """The turns that an answer is to follow: up to a text, or to the last question (None)."""
        is_answered = bool(self.turns) and self.turns[-1].role == "assistant"
        if text is None:
            return self.turns[:-1] if is_answered else list(self.turns)
        return [*(self.turns if is_answered else self.turns[:-1]), Message("user", text)]

    def fork(self, name: str) -> Chat:
        """The same conversation, which another adapter, or ``base``, goes on with."""
        other = Chat(self.model, self.decoding, name, self.system)
        other.turns = list(self.turns)
        num_own = len(self.turns) - len(self.inherited)
        other.inherited = [*self.inherited, *[self.name] * num_own]
        return other

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns, self.inherited = [], []

    def save(self, path: Path) -> None:
        """Write the conversation as a row of ``messages``, which ``fit`` and ``generate`` read.

        Raises:
            TrainingStoppedError: if it cannot be written.
        """
        write_atomic(path, self.as_line())

    def as_line(self) -> str:
        """The conversation as that row, a line of JSON."""
        messages = [{"role": m.role, "content": m.content} for m in self._messages(self.turns)]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"

    def _messages(self, turns: list[Message]) -> list[Message]:
        return [Message("system", self.system), *turns] if self.system else turns

    def _answer(
        self, asked: list[Message], emit: Callable[[str], None], should_stop: Callable[[], bool]
    ) -> RowAnswer:
        """Answer turns that end with a question; what was said before is kept if that fails."""
        before = self.turns, self.inherited
        self.turns, self.inherited = asked, self.inherited[: len(asked)]
        try:
            answer = self._generate(self._prompt(), emit, should_stop)
        except torch.OutOfMemoryError as error:
            self.turns, self.inherited = before
            raise HardwareError(
                "The conversation does not fit into memory; begin a new one, or ask for shorter "
                "answers with --max-new-tokens."
            ) from error
        except BaseException:
            self.turns, self.inherited = before
            raise
        if answer.text or answer.stop_reason != "interrupted":
            self.turns = [*asked, Message("assistant", answer.text)]
        return answer

    def _generate(
        self, ids: list[int], emit: Callable[[str], None], should_stop: Callable[[], bool]
    ) -> RowAnswer:
        if should_stop():
            return RowAnswer([], "", "interrupted")
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
        # Cut in the middle of a character, which the stream has not shown either.
        return replace(answer, text=answer.text.rstrip(UNFINISHED).rstrip())

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
