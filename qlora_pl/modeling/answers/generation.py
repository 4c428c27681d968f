"""Prompts -> answers, a batch at a time: the one way in which a model is asked.

Samples of a run, ``predict`` and the commands that answer all come here, so that a row's answer is
the same in each of them, alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_pl.batch import PromptBatch
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.row_logits import RowLimits, RowLogits, generator_of
from qlora_pl.modeling.base.encoder_decoder import is_encoder_decoder
from qlora_pl.modeling.evaluation_mode import evaluation_mode
from qlora_pl.modeling.sharding import is_shared

StopReason = Literal["stop_token", "stop_text", "length", "interrupted"]


@dataclass(frozen=True)
class RowAnswer:
    """What a row came to."""

    ids: list[int]
    """Tokens of the answer, without what ended it."""
    text: str
    stop_reason: StopReason
    """``length``: at ``max_new_tokens``, ``max_length`` or the end of what the model can read."""


def answer_rows(
    model: nn.Module,
    tokenizer: Any,
    batch: PromptBatch,
    stop_ids: Collection[int],
    config: DecodingConfig,
) -> list[dict[str, Any]]:
    """Answer a batch of prompts: one mapping a row, with its number, prompt, answer, reference."""
    given = [batch["input_ids"], batch["attention_mask"]]
    row_ids = batch["row_ids"].tolist()
    if not batch["prompts"]:  # the end of a split that does not divide by the devices
        if not is_shared(model):
            return []
        given = [tensor.new_ones(1, 1) for tensor in given]  # an answer that nobody wants
        row_ids = [0]
    answers = answer_batch(model, tokenizer, given[0], given[1], stop_ids, config, row_ids)
    columns = (row_ids, batch["prompts"], answers, batch["references"])
    return [
        {"row": row, "prompt": prompt, "answer": answer.text, "reference": reference}
        for row, prompt, answer, reference in zip(*columns, strict=False)
    ]


def answer_batch(
    model: nn.Module,
    tokenizer: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    stop_ids: Collection[int],
    config: DecodingConfig,
    row_ids: Sequence[int] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    streamer: Any = None,
) -> list[RowAnswer]:
    """Answer left-padded prompts; modes and random states are as before afterwards.

    Of a model that devices share all have to ask together, each its own prompts.

    Args:
        model: A language model, with or without adapters; a decoder beside an encoder writes the
            answer alone, after its start token.
        tokenizer: Its tokenizer.
        input_ids: ``(B, T)``, padded on the left.
        attention_mask: ``(B, T)``.
        stop_ids: Tokens that end an answer; they are not part of the returned text.
        config: How to draw.
        row_ids: Numbers that seed the rows' draws; None: their places.
        should_stop: Asked after each token whether to leave the answers as they are.
        streamer: Told each token as it comes, of all rows together; without beams.
    """
    row_ids = range(len(input_ids)) if row_ids is None else row_ids
    if config.do_sample and not config.draws_rows_apart and len(input_ids) > 1:
        # transformers draws a beam search from the global generator, so each row has it alone.
        return [
            answer_batch(
                model,
                tokenizer,
                *_row(input_ids, attention_mask, place),
                stop_ids,
                config,
                [row_ids[place]],
                should_stop,
            )[0]
            for place in range(len(input_ids))
        ]
    num_padded = (attention_mask == 0).sum(dim=1).tolist()
    is_pair = is_encoder_decoder(model)
    num_given = 1 if is_pair else input_ids.shape[1]
    lengths = [0 if is_pair else num_given - padding for padding in num_padded]
    limits = [room_for_answer(config, length, context_of(model)) for length in lengths]
    output = _generate(
        model,
        tokenizer,
        (input_ids, attention_mask),
        stop_ids,
        config,
        RowLogits(config, [0 if is_pair else n for n in num_padded], row_ids, input_ids.device),
        RowLimits(tokenizer.decode, num_given, limits, config.stop, should_stop),
        row_ids,
        streamer,
    )
    answers = output[:, num_given:].tolist()
    return [
        row_answer(ids[:limit], limit, stop_ids, config.stop, tokenizer)
        for ids, limit in zip(answers, limits, strict=True)
    ]


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    stop_ids: Collection[int],
    config: DecodingConfig,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """The texts of ``answer_batch``."""
    found = answer_batch(
        model, tokenizer, input_ids, attention_mask, stop_ids, config, should_stop=should_stop
    )
    return [answer.text for answer in found]


def _generate(
    model: Any,
    tokenizer: Any,
    given: tuple[Tensor, Tensor],
    stop_ids: Collection[int],
    config: DecodingConfig,
    logits: RowLogits,
    ends: RowLimits,
    row_ids: Sequence[int],
    streamer: Any,
) -> Tensor:
    """``(B, T)`` ids with what was given, padded on the right."""
    from transformers import GenerationConfig  # slow to import

    generation = GenerationConfig(
        **config.for_transformers(),
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        eos_token_id=sorted(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    with evaluation_mode(model), _without_own_settings(model), torch.no_grad():
        if config.do_sample and not config.draws_rows_apart:
            torch.manual_seed(generator_of(config.seed, row_ids[0]).initial_seed())
        output: Tensor = model.generate(
            input_ids=given[0],
            attention_mask=given[1],
            generation_config=generation,
            logits_processor=[logits],
            synced_gpus=is_shared(model),  # whoever is done goes on until all are
            stopping_criteria=[ends],
            streamer=streamer,
        )
    return output


def _row(input_ids: Tensor, attention_mask: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """A row alone, without padding."""
    first, one = int((attention_mask[place] == 0).sum()), slice(place, place + 1)
    return input_ids[one, first:], attention_mask[one, first:]


def context_of(model: Any) -> int | None:
    """Tokens that a model can read; None: as many as there is memory for."""
    config = model.config
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def room_for_answer(config: DecodingConfig, num_given: int, context: int | None) -> int:
    """Tokens of an answer to a prompt of so many at most, at least one."""
    ends = [end for end in (config.max_length, context) if end]
    return max(1, min([config.max_new_tokens, *(end - num_given for end in ends)]))


def row_answer(
    ids: list[int], limit: int, stop_ids: Collection[int], stop: Sequence[str], tokenizer: Any
) -> RowAnswer:
    """What a row's new tokens come to.

    Args:
        ids: Of which the first ``limit`` count; padding may follow what ends the answer.
        limit: From ``room_for_answer``.
        stop_ids: Tokens that end an answer.
        stop: Texts that end it.
        tokenizer: Ids -> text.
    """
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    own = ids[:end]
    text: str = tokenizer.decode(own)
    if places := [place for place in (text.find(mark) for mark in stop) if place >= 0]:
        while own and any(mark in tokenizer.decode(own[:-1]) for mark in stop):
            own = own[:-1]  # padding that follows
        return RowAnswer(own, text[: min(places)].strip(), "stop_text")
    reason: StopReason = "length" if len(ids) >= limit else "interrupted"
    return RowAnswer(own, text.strip(), reason if end is None else "stop_token")


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Hide the base's generation_config.json, from which transformers fills what is not given.

    Its repetition penalties and suppressed tokens would apply without being named anywhere.
    """
    from transformers import GenerationConfig  # slow to import

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
