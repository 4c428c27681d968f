"""Prompts -> answers: how a model is asked during a run (samples) and by ``predict``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.batch import PromptBatch
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.sharding import is_shared


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How answers are drawn."""

    max_new_tokens: int = 256
    """Tokens of an answer at most; the original's default is 256."""
    do_sample: bool = False
    """Whether answers are drawn at random. False: the likeliest token each time; temperature, top_p
    and top_k then have no effect."""
    temperature: float = 1.0
    """Divides the logits before sampling; the paper's evaluations used 0.7."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share; the paper's evaluations used 0.9."""
    top_k: int = 0
    """Sample from so many likeliest tokens; 0: from all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that were there already; 1.0: none."""

    def __post_init__(self) -> None:
        checks = [
            (
                self.max_new_tokens >= 1,
                f"max_new_tokens: must be at least 1, got {self.max_new_tokens}",
            ),
            (self.temperature > 0, f"temperature: must be above 0, got {self.temperature}"),
            (0 < self.top_p <= 1, f"top_p: must lie above 0, up to 1, got {self.top_p}"),
            (self.top_k >= 0, f"top_k: must be 0 or more, got {self.top_k}"),
            (
                self.repetition_penalty > 0,
                f"repetition_penalty: must be above 0, got {self.repetition_penalty}",
            ),
            (
                self.do_sample or (self.temperature, self.top_p, self.top_k) == (1.0, 1.0, 0),
                "temperature, top_p and top_k have no effect with do_sample: false; set it to true",
            ),
        ]
        if problems := [f"decoding.{sentence}." for holds, sentence in checks if not holds]:
            raise ConfigurationError(problems)

    def for_transformers(self) -> dict[str, Any]:
        """The same as keyword arguments of ``generate``."""
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.do_sample:
            arguments |= {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,  # 0, not None, which transformers would read as its 50
            }
        return arguments


def answer_rows(
    model: nn.Module,
    tokenizer: Any,
    batch: PromptBatch,
    stop_ids: Collection[int],
    config: DecodingConfig,
) -> list[dict[str, Any]]:
    """Answer a batch of prompts: one mapping a row, with its number, prompt, answer, reference."""
    given = [batch["input_ids"], batch["attention_mask"]]
    if not batch["prompts"]:  # the end of a split that does not divide by the devices
        if not is_shared(model):
            return []
        given = [tensor.new_ones(1, 1) for tensor in given]  # an answer that nobody wants
    answers = generate_answers(model, tokenizer, given[0], given[1], stop_ids, config)
    columns = (batch["row_ids"].tolist(), batch["prompts"], answers, batch["references"])
    return [
        {"row": row, "prompt": prompt, "answer": answer, "reference": reference}
        for row, prompt, answer, reference in zip(*columns, strict=False)
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
        should_stop: Asked after each token whether to leave the answers as they are.
    """
    from transformers import GenerationConfig  # slow to import

    model_config: Any = model.config
    num_given = 1 if model_config.is_encoder_decoder else input_ids.shape[1]
    generation = GenerationConfig(
        **config.for_transformers(),
        decoder_start_token_id=getattr(model_config, "decoder_start_token_id", None),
        eos_token_id=sorted(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    with evaluation_mode(model), _without_own_settings(model), torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=generation,
            synced_gpus=is_shared(model),  # whoever is done goes on until all are
            stopping_criteria=[
                lambda ids, _: torch.full((len(ids),), should_stop(), device=ids.device)
            ],
        )
    answers = output[:, num_given:].tolist()
    return [tokenizer.decode(_until_stop(ids, stop_ids)).strip() for ids in answers]


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


def _until_stop(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and random states of their own, within the block.

    Every module's mode is put back: setting the root to training would wake dropout that somebody
    had silenced.
    """
    modes = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
