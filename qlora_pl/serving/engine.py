"""Rows that wait -> answers: one thread asks the model, batch after batch.

Rows that wait for the same adapter with the same settings are asked together: a row's answer does
not depend on the batch it is in.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qlora_pl.data.batches.collation import collate_prompts
from qlora_pl.inference.answering import Encoded
from qlora_pl.inference.loading import Model
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.answers.generation import answer_batch, context_of, room_for_answer
from qlora_pl.modeling.answers.row_logits import SEED_STRIDE
from qlora_pl.modeling.base.encoder_decoder import is_encoder_decoder
from qlora_pl.modeling.steps.out_of_memory import free_memory, is_out_of_memory
from qlora_pl.serving.refusals import RefusedError, broken, out_of_memory, stopping
from qlora_pl.serving.rows import BatchStreamer, Job, Row, RowStream

logger = logging.getLogger(__name__)

MOST_WAITING = 1024
"""Rows; whoever comes after that is told to come back."""


class Engine:
    """Asks a model, in a thread of its own.

    Args:
        model: What answers; from then on nobody else may ask it.
        batch_size: Rows at a time.
    """

    def __init__(self, model: Model, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._waiting: deque[Row] = deque()
        self._change = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def submit(self, job: Job, prompts: Sequence[Encoded], seed: int) -> None:
        """Queue a job; answer ``k`` is that of row ``k`` of a file with this seed.

        Raises:
            RefusedError: if too much is waiting, or the server is stopping.
        """
        rows = [
            Row(job, index, replace(one, prompt=replace(one.prompt, row=_draw(seed, index))))
            for index, one in enumerate(prompts)
        ]
        with self._change:
            if self._is_closed:
                raise stopping()
            if len(self._waiting) + len(rows) > MOST_WAITING:
                raise RefusedError(
                    503,
                    f"{len(self._waiting)} answers are waited for; ask again later.",
                    code="busy",
                )
            self._waiting.extend(rows)
            self._change.notify()

    def close(self) -> None:
        """Stop what is being answered, and refuse the rest; callable from a signal handler."""
        self._is_closed = True

    def join(self) -> None:
        """After ``close``: wait for the thread, and tell whoever still waits."""
        self.close()
        with self._change:
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self._answer(batch)
        for row in self._waiting:
            row.job.tell(stopping())

    def _next(self) -> list[Row]:
        """The oldest row that is wanted, and others of its kind; none when it is time to end."""
        with self._change:
            while not self._is_closed:
                rows = [row for row in self._waiting if not row.job.has_left]
                batch = [row for row in rows if row.kind == rows[0].kind][: self._batch_size]
                taken = set(map(id, batch))
                self._waiting = deque(row for row in rows if id(row) not in taken)
                if batch:
                    return batch
                self._change.wait()
        return []

    def _answer(self, batch: list[Row]) -> None:
        streams = self._streams(batch)
        failure = self._try(streams)
        left = [stream for stream in streams if stream.is_wanted]
        if failure is None:
            if left and self._is_closed:
                _refuse(left, stopping())
            return
        unbegun = [stream.row for stream in left if not stream.has_told]
        if failure.code != "out_of_memory" or len(batch) == 1:
            _refuse(left, failure)
            return
        # What has been told of an answer cannot be taken back, so that one is not begun again.
        _refuse([stream for stream in left if stream.has_told], failure)
        free_memory()
        for half in (unbegun[: len(unbegun) // 2], unbegun[len(unbegun) // 2 :]):
            if half:
                self._answer(half)

    def _try(self, streams: Sequence[RowStream]) -> RefusedError | None:
        """Ask the model; what went wrong, if something did."""
        rows = [stream.row for stream in streams]
        tokenizer, encoder = self._model.tokenizer, self._model.encoder
        numbers = [row.prompt.prompt.row for row in rows]
        name, decoding = rows[0].kind

        def should_stop() -> bool:
            return self._is_closed or not any(stream.is_wanted for stream in streams)

        try:
            inputs = collate_prompts(
                [(row.prompt.text, row.prompt.ids) for row in rows],
                [""] * len(rows),
                np.arange(len(rows)),
                tokenizer.pad_token_id,
            )
            with self._model.answering_as(None if name == BASE else name) as model:
                answer_batch(
                    model,
                    tokenizer,
                    inputs["input_ids"].to(self._model.device),
                    inputs["attention_mask"].to(self._model.device),
                    encoder.stop_ids,
                    decoding,
                    numbers,
                    should_stop,
                    streamer=BatchStreamer(streams),
                )
        except Exception as error:  # a server outlives whatever one request does to it
            if is_out_of_memory(error):
                return out_of_memory()
            # Without the message, which may quote what was asked.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("A request failed with %s:\n%s", type(error).__name__, where)
            return broken()
        return None

    def _streams(self, batch: Sequence[Row]) -> list[RowStream]:
        model = self._model.model
        is_pair = is_encoder_decoder(model)
        return [
            RowStream(
                row,
                room_for_answer(
                    row.job.decoding, 0 if is_pair else len(row.prompt.ids), context_of(model)
                ),
                self._model.tokenizer,
                self._model.encoder.stop_ids,
            )
            for row in batch
        ]


def _draw(seed: int, index: int) -> int:
    """The number of a row under the seed 0 that draws as ``index`` does under ``seed``."""
    return seed * SEED_STRIDE + index


def _refuse(streams: Sequence[RowStream], error: RefusedError) -> None:
    for job in {stream.row.job for stream in streams}:
        job.tell(error)
