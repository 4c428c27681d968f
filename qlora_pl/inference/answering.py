"""Prompts -> answers, in the order they were asked, in batches of about one length.

A prompt's answer does not depend on the batch it is in: rows are padded on the left, count their
own text only, and draw from a generator of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qlora_pl.data.batches.collation import collate_prompts
from qlora_pl.errors import HardwareError
from qlora_pl.inference.loading import Model
from qlora_pl.inference.prompts import Prompt
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import RowAnswer, StopReason, answer_batch, context_of

BATCHES_AHEAD = 16
"""Batches whose prompts are sorted by length together: enough for little padding, few enough that
an answer does not wait for the end of a long file."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a prompt came to."""

    row: int
    adapter: str
    """The name of the adapter that answered; ``base`` for none."""
    prompt: str
    """The text that the model read, as its template rendered it."""
    answer: str
    prompt_tokens: int
    answer_tokens: int
    stop_reason: StopReason
    """``stop_token``, ``stop_text``, ``length`` or ``interrupted``."""
    seconds: float
    """That its batch took."""

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model reads it."""

    prompt: Prompt
    text: str
    ids: list[int]


@dataclass(frozen=True)
class TooLong:
    """A prompt that leaves no room for an answer."""

    prompt: Prompt
    sentence: str


class Answerer:
    """Asks a model.

    Args:
        model: What answers.
        decoding: How answers are drawn.
        batch_size: Prompts at a time; halved where they do not fit into memory.
        is_raw: Whether questions are read as they are, without the template.
    """

    def __init__(
        self, model: Model, decoding: DecodingConfig, batch_size: int = 8, is_raw: bool = False
    ) -> None:
        self.model = model
        self.decoding = decoding
        self.batch_size = batch_size
        self.is_raw = is_raw

    def answers(
        self,
        prompts: Sequence[Prompt],
        names: Sequence[str],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Answer | TooLong]:
        """Every answer in order of the prompts, of each prompt those of all names.

        Args:
            prompts: What is asked.
            names: Adapters, or ``base``.
            should_stop: Asked after each token whether to leave it at that.
        """
        ahead = self.batch_size * BATCHES_AHEAD
        for start in range(0, len(prompts), ahead):
            found: dict[tuple[int, str], Answer] = {}
            encoded = [self.encode(prompt) for prompt in prompts[start : start + ahead]]
            readable = [one for one in encoded if isinstance(one, Encoded)]
            readable.sort(key=lambda one: len(one.ids), reverse=True)  # the largest batch first
            for name in names:
                for batch in self._batches(readable):
                    for answer in self._ask(batch, name, should_stop):
                        found[answer.row, name] = answer
                    if should_stop():
                        break
            for one in encoded:
                if isinstance(one, TooLong):
                    yield one
                    continue
                for name in names:
                    if (one.prompt.row, name) in found:
                        yield found[one.prompt.row, name]
            if should_stop():
                return

    def encode(self, prompt: Prompt) -> Encoded | TooLong:
        """Text and ids of a prompt that leaves room for an answer."""
        if self.is_raw:
            text = prompt.question
            ids = self.model.tokenizer(text)["input_ids"]
        else:
            text, ids = self.model.encoder.encode_prompt(prompt.conversation)
        limits = [
            limit
            for limit in (context_of(self.model.model), self.decoding.max_length)
            if limit is not None
        ]
        if limits and len(ids) >= min(limits):
            return TooLong(
                prompt,
                f"{prompt.where}: the prompt has {len(ids)} tokens, and prompt and answer together "
                f"may have {min(limits)}; shorten it.",
            )
        return Encoded(prompt, text, ids)

    def _batches(self, encoded: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
        start = 0
        while start < len(encoded):
            batch = encoded[start : start + self.batch_size]  # which may shrink meanwhile
            start += len(batch)
            yield batch

    def _ask(
        self, batch: Sequence[Encoded], name: str, should_stop: Callable[[], bool]
    ) -> list[Answer]:
        started = time.perf_counter()
        try:
            with self.model.answering_as(None if name == BASE else name) as model:
                found = self._generate(model, batch, should_stop)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise HardwareError(
                    f"{batch[0].prompt.where}: the prompt of {len(batch[0].ids)} tokens does not "
                    "fit into memory, even alone; shorten it, or lower --max-new-tokens."
                ) from error
            torch.cuda.empty_cache()
            half = len(batch) // 2
            self.batch_size = max(1, half)
            return [
                *self._ask(batch[:half], name, should_stop),
                *self._ask(batch[half:], name, should_stop),
            ]
        seconds = time.perf_counter() - started
        return [
            Answer(
                row=one.prompt.row,
                adapter=name,
                prompt=one.text,
                answer=answer.text,
                prompt_tokens=len(one.ids),
                answer_tokens=len(answer.ids),
                stop_reason=answer.stop_reason,
                seconds=round(seconds, 3),
            )
            for one, answer in zip(batch, found, strict=True)
        ]

    def _generate(
        self, model: Any, batch: Sequence[Encoded], should_stop: Callable[[], bool]
    ) -> list[RowAnswer]:
        rows = [one.prompt.row for one in batch]
        pad_id = self.model.tokenizer.pad_token_id
        prompts = [(one.text, one.ids) for one in batch]
        inputs = collate_prompts(prompts, [""] * len(batch), np.array(rows), pad_id)
        return answer_batch(
            model,
            self.model.tokenizer,
            inputs["input_ids"].to(self.model.device),
            inputs["attention_mask"].to(self.model.device),
            self.model.encoder.stop_ids,
            self.decoding,
            rows,
            should_stop,
        )
