"""Tokens a second of answers, and how often a batch changes them; one process, one turn each.

Ours is the engine of ``qlora-pl generate``. Theirs is transformers' ``generate`` over the same ids,
in batches in the order of the prompts: over the very same model, and over one that transformers and
PEFT loaded as their documentation shows.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_pl import load_adapter
from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.inference.answering import Answerer, Encoded
from qlora_pl.inference.loading import Model, load
from qlora_pl.inference.machine import best_device
from qlora_pl.inference.prompts import Prompt
from qlora_pl.inference.source import ModelChoice, resolve_source
from qlora_pl.modeling.answers.decoding import DecodingConfig

BATCH_SIZES = (1, 8, 32)
LEAST_PROMPTS = 8
"""Of a timed run; as many as the batch holds, if those are more."""
OURS, SAME, PLAIN = "qlora_pl", "transformers, same model", "transformers and PEFT"
Answers = list[tuple[str, int]]
"""Text and number of tokens of each prompt's answer, in the order of the prompts."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured."""

    adapter: Path
    base: str
    num_prompts: int
    num_tokens: int
    """Of an answer at most."""
    repeats: int

    def choice(self, **changes: Any) -> dict[str, Any]:
        """Fields of a ``ModelChoice``."""
        return {"base": self.base, **changes}


def prompts_of(task: Task, rows: Path | None) -> list[Prompt]:
    """Questions of mixed length: every other one comes after a text, of up to some 80 words.

    Args:
        task: How many.
        rows: Questions and answers as JSON lines; None: of one word.
    """
    if rows is None:
        texts = [(f"How many legs has animal {number}?", "eight " * 9) for number in range(64)]
    else:
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        texts = [_question_and_answer(line) for line in lines]
    asked = []
    for number in range(task.num_prompts):
        question = texts[number % len(texts)][0]
        length = (number * 7919) % 5 if number % 2 else 0  # answers before it, 0 to 4
        before = " ".join(texts[(number + k) % len(texts)][1] for k in range(length))
        asked.append(f"{before}\n\n{question}" if before else question)
    return [
        Prompt(row, Conversation((Message("user", text),)), {}, f"prompt {row}")
        for row, text in enumerate(asked)
    ]


def _question_and_answer(line: dict[str, Any]) -> tuple[str, str]:
    if "messages" in line:
        question, answer = (line["messages"][place]["content"] for place in (-2, -1))
        return question, answer
    question = line.get("instruction") or line["prompt"]
    return question, line.get("output") or line["response"]


class Contenders:
    """Those that answer, by name: a batch size and a number of prompts -> answers."""

    def __init__(self, task: Task, prompts: Sequence[Prompt], has_plain: bool = True) -> None:
        self.model = load_adapter(task.adapter, **task.choice())
        self.prompts = prompts
        self._decoding = DecodingConfig(max_new_tokens=task.num_tokens)
        self.encoded = [
            one
            for prompt in prompts
            if isinstance(one := Answerer(self.model, self._decoding).encode(prompt), Encoded)
        ]
        assert len(self.encoded) == len(prompts), "a prompt is too long for the model"
        self.by_name: dict[str, Callable[[int, int], Answers]] = {
            OURS: lambda size, count: self.ours(self.model, size, count),
            SAME: lambda size, count: self.theirs(self.model.model, size, count),
        }
        if has_plain:
            plain = load_plainly(task, self.model)
            self.by_name[PLAIN] = lambda size, count: self.theirs(plain, size, count)

    def count(self, size: int) -> int:
        """Prompts of a timed run in batches of a size."""
        return min(len(self.prompts), max(LEAST_PROMPTS, size))

    def ours(self, model: Model, batch_size: int, count: int) -> Answers:
        """The engine of ``qlora-pl generate``."""
        answerer = Answerer(model, self._decoding, batch_size)
        found = answerer.answers(self.prompts[:count], [model.adapters[0]])
        return [(answer.answer, answer.answer_tokens) for answer in found]  # type: ignore[union-attr]

    def theirs(self, model: Any, batch_size: int, count: int) -> Answers:
        """``generate`` of transformers over the same ids, padded on the left."""
        tokenizer, stop_ids = self.model.tokenizer, sorted(self.model.encoder.stop_ids)
        found: Answers = []
        for start in range(0, count, batch_size):
            ids = [one.ids for one in self.encoded[start : min(start + batch_size, count)]]
            given = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
            with torch.no_grad():
                output = model.generate(
                    **given.to(self.model.device),
                    max_new_tokens=self._decoding.max_new_tokens,
                    do_sample=False,
                    eos_token_id=stop_ids,
                    pad_token_id=tokenizer.pad_token_id,
                )
            for row in output[:, given["input_ids"].shape[1] :].tolist():
                end = next((n for n, token in enumerate(row) if token in stop_ids), len(row))
                found.append((tokenizer.decode(row[:end]).strip(), end))
        return found


def load_plainly(task: Task, model: Model) -> Any:
    """The same adapter over the same kind of base, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_pl.modeling.base.quantization import resolve_compute_dtype

    kind = model.source.quantization
    dtype = resolve_compute_dtype(kind.compute_dtype, model.device)
    base = AutoModelForCausalLM.from_pretrained(
        task.base,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind.quant_type,
            bnb_4bit_use_double_quant=bool(kind.double_quant),
            bnb_4bit_compute_dtype=dtype,
        ),
        dtype=dtype,
        device_map={"": str(model.device)},
    )
    return PeftModel.from_pretrained(base, task.adapter).eval()


def speed(
    task: Task, rows: Path | None, sizes: Sequence[int] = BATCH_SIZES, has_plain: bool = True
) -> dict[str, Any]:
    """Tokens a second of each contender at each batch size, in turn; and what a batch changes."""
    contenders = Contenders(task, prompts_of(task, rows), has_plain)
    answers: dict[tuple[str, int], Answers] = {}
    rates: dict[tuple[str, int], list[float]] = {}
    for name, answer in contenders.by_name.items():  # weights are repacked, kernels are chosen
        answer(max(sizes), contenders.count(max(sizes)))
        answers[name, 0] = answer(1, len(contenders.prompts))
    for _ in range(task.repeats):
        for size in sizes:
            for name, answer in contenders.by_name.items():
                began = time.perf_counter()
                found = answer(size, contenders.count(size))
                seconds = time.perf_counter() - began
                answers[name, size] = found
                rates.setdefault((name, size), []).append(sum(n for _, n in found) / seconds)
    return {
        "prompt_tokens": sorted(len(one.ids) for one in contenders.encoded),
        "batch_sizes": [
            _of_size(size, list(contenders.by_name), rates, answers, contenders.model.tokenizer)
            for size in sizes
        ],
    }


def _of_size(
    size: int, names: Sequence[str], rates: Any, answers: Any, tokenizer: Any
) -> dict[str, Any]:
    medians = {name: statistics.median(rates[name, size]) for name in names}
    return {
        "batch_size": size,
        "tokens_per_second": {
            name: {"median": medians[name], "all": rates[name, size]} for name in names
        },
        "ours_over": {
            name: {
                "median": medians[OURS] / medians[name],
                "pairs": [
                    ours / other
                    for ours, other in zip(rates[OURS, size], rates[name, size], strict=True)
                ],
            }
            for name in names
            if name != OURS
        },
        "answer_tokens": {name: sum(n for _, n in answers[name, size]) for name in names},
        "against_alone": {
            name: parted(answers[name, 0], answers[name, size], tokenizer) for name in names
        },
    }


def parted(alone: Answers, batched: Answers, tokenizer: Any) -> dict[str, Any]:
    """How many of the batched answers differ, and at which of their tokens."""
    places = []
    for (one, _), (other, _) in zip(alone, batched, strict=False):
        if one != other:
            common = next(
                (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                min(len(one), len(other)),
            )
            places.append(len(tokenizer(one[:common], add_special_tokens=False)["input_ids"]))
    return {"differ": len(places), "of": min(len(alone), len(batched)), "at_token": sorted(places)}


def kinds(task: Task, rows: Path | None, sizes: Sequence[int] = BATCH_SIZES) -> dict[str, Any]:
    """4 bits against the same weights decoded to bfloat16, both by this project's engine."""
    contenders = Contenders(task, prompts_of(task, rows), has_plain=False)
    models = {"4 bits": contenders.model, "dequantised": dequantised(task)}
    rates: dict[tuple[str, int], list[float]] = {}
    answers: dict[tuple[str, int], Answers] = {}
    for model in models.values():
        contenders.ours(model, max(sizes), contenders.count(max(sizes)))
    for _ in range(task.repeats):
        for size in sizes:
            for name, model in models.items():
                began = time.perf_counter()
                answers[name, size] = contenders.ours(model, size, contenders.count(size))
                seconds = time.perf_counter() - began
                tokens = sum(n for _, n in answers[name, size])
                rates.setdefault((name, size), []).append(tokens / seconds)
    tokenizer = contenders.model.tokenizer
    return {
        "stored_bytes": {name: stored_bytes(model.model) for name, model in models.items()},
        "batch_sizes": [
            {
                "batch_size": size,
                "tokens_per_second": {
                    name: {"median": statistics.median(rates[name, size]), "all": rates[name, size]}
                    for name in models
                },
                "answers": parted(answers["dequantised", size], answers["4 bits", size], tokenizer),
            }
            for size in sizes
        ],
    }


def dequantised(task: Task) -> Model:
    """The adapter over what its 4-bit base decodes to, in bfloat16."""
    import bitsandbytes as bnb

    names = (str(task.adapter),)
    packed = load(
        resolve_source(ModelChoice(adapter=names, **task.choice())), best_device(), is_exact=True
    )
    wide = load_adapter(task.adapter, **task.choice(precision="bfloat16"))
    places = dict(wide.model.named_modules())
    for name, module in packed.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            decoded = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
            places[name].weight.data = decoded.to(torch.bfloat16)  # type: ignore[union-attr]
    return wide


def stored_bytes(model: Any) -> int:
    """Of all parameters, as they are kept."""
    return sum(one.numel() * one.element_size() for one in model.parameters())
