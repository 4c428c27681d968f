"""A body in OpenAI's format -> what is wanted; what cannot be done is refused, never ignored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.inference.prompts import Prompt, conversation_of
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.serving.refusals import RefusedError

MOST_ANSWERS = 128
"""Of one request, as in OpenAI's interface."""
DRAWING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "typical_p": 1.0}
"""What decides how tokens are drawn, at values that change nothing."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a request asks for."""

    name: str
    """An adapter, or ``base``."""
    prompts: tuple[Prompt, ...]
    is_raw: bool
    decoding: DecodingConfig
    seed: int | None
    """None: the request names none."""
    num_answers: int
    """To each prompt."""
    is_streamed: bool
    has_usage: bool
    """Whether a stream ends with its usage."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
    )


Check = tuple[Callable[[Any], bool], str]
_NUMBER: Check = (_is_number, "a number")
_WHOLE: Check = (_is_whole, "a whole number")
_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_TEXT: Check = (lambda value: isinstance(value, str), "a text")
_TEXTS: Check = (_is_texts, "a text, or a list of texts (token ids are not read)")
_LIST: Check = (lambda value: isinstance(value, list) and bool(value), "a list of messages")
_OBJECT: Check = (lambda value: isinstance(value, dict), "an object")
_ANY: Check = (lambda value: True, "")

SHARED: dict[str, Check] = {
    "model": _TEXT,
    "max_tokens": _WHOLE,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _WHOLE,
    "repetition_penalty": _NUMBER,
    "n": _WHOLE,
    "seed": _WHOLE,
    "stop": _TEXTS,
    "stream": _FLAG,
    "stream_options": _OBJECT,
    "user": _ANY,
    "metadata": _ANY,
    "service_tier": _ANY,
    "safety_identifier": _ANY,
    "prompt_cache_key": _ANY,
}
"""Keys that are read, or that say nothing about the answer."""
CHAT = {**SHARED, "messages": _LIST, "max_completion_tokens": _WHOLE}
COMPLETION = {**SHARED, "prompt": _TEXTS}

UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), "repetition_penalty is what this server has"),
    "presence_penalty": ((0,), "repetition_penalty is what this server has"),
    "logprobs": ((False, 0), "leave it out"),
    "top_logprobs": ((0,), "leave it out"),
    "logit_bias": (({},), "leave it out"),
    "tools": (([],), "leave it out"),
    "tool_choice": (("none", "auto"), "leave it out"),
    "parallel_tool_calls": ((True, False), "leave it out"),
    "functions": (([],), "leave it out"),
    "function_call": (("none", "auto"), "leave it out"),
    "response_format": (({"type": "text"},), "say in the prompt what the answer is to look like"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "prediction": ((), "leave it out"),
    "reasoning_effort": (("none",), "leave it out"),
    "verbosity": ((), "leave it out"),
    "web_search_options": ((), "leave it out"),
    "store": ((False,), "nothing is kept here"),
    "echo": ((False,), "leave it out"),
    "best_of": ((1,), "use n"),
    "suffix": (("",), "leave it out"),
}
"""Keys of OpenAI's that are not done here, the values that ask for nothing, and what to do."""


def read_chat(
    body: Mapping[str, Any], names: Sequence[str], defaults: DecodingConfig, is_seeded: bool
) -> Wish:
    """What a body of ``/v1/chat/completions`` asks for.

    Args:
        body: Parsed.
        names: Who can answer.
        defaults: How answers are drawn where the body does not say.
        is_seeded: Whether the seed of ``defaults`` is meant.

    Raises:
        RefusedError: naming the key that is missing, wrong or not supported.
    """
    _check(body, CHAT, ("model", "messages"))
    messages = [_message(number, one) for number, one in enumerate(body["messages"], start=1)]
    problem, conversation = conversation_of({"messages": messages}, None)
    if conversation is None:
        raise RefusedError(400, f"messages: {problem}.", "messages")
    prompt = Prompt(0, conversation, {}, "messages")
    return _wish(body, names, defaults, is_seeded, (prompt,), is_raw=False)


def read_completion(
    body: Mapping[str, Any], names: Sequence[str], defaults: DecodingConfig, is_seeded: bool
) -> Wish:
    """What a body of ``/v1/completions`` asks for: texts that are read as they are.

    Args and errors are those of ``read_chat``.
    """
    _check(body, COMPLETION, ("model", "prompt"))
    texts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
    if not all(texts):
        raise RefusedError(400, "prompt: an empty text cannot be gone on with.", "prompt")
    prompts = tuple(
        Prompt(0, Conversation((Message("user", text),)), {}, "prompt") for text in texts
    )
    return _wish(body, names, defaults, is_seeded, prompts, is_raw=True)


def _check(body: Mapping[str, Any], known: Mapping[str, Check], needed: Sequence[str]) -> None:
    for key in needed:
        if body.get(key) is None:
            raise RefusedError(400, f"{key}: is missing; every request names it.", key)
    for key, value in body.items():
        if value is None:
            continue
        if key in known:
            holds, kind = known[key]
            if not holds(value):
                raise RefusedError(400, f"{key}: must be {kind}.", key)
        elif key in UNSUPPORTED:
            nothing, hint = UNSUPPORTED[key]
            if not any(value == one for one in nothing):
                raise RefusedError(
                    400, f"{key}: is not supported here; {hint}.", key, "unsupported_parameter"
                )
        else:
            end = did_you_mean(key, known)
            raise RefusedError(400, f"No key is called '{key[:80]}'{end}", key[:80])


def _message(number: int, given: Any) -> Any:
    """A message of OpenAI's in the shape of a file of prompts."""
    if not isinstance(given, Mapping):
        return given
    if extra := [key for key, value in given.items() if key not in PARTS and value]:
        raise RefusedError(
            400, f"messages: '{extra[0][:80]}' of message {number} is not supported.", "messages"
        )
    content = given.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            raise RefusedError(
                400, f"messages: message {number} has parts that are no text.", "messages"
            )
        content = "".join(str(part.get("text", "")) for part in content)
    role = given.get("role")
    return {"role": "system" if role == "developer" else role, "content": content}


PARTS = ("role", "content")


def _wish(
    body: Mapping[str, Any],
    names: Sequence[str],
    defaults: DecodingConfig,
    is_seeded: bool,
    prompts: tuple[Prompt, ...],
    is_raw: bool,
) -> Wish:
    name = body["model"]
    if name not in names:
        raise RefusedError(
            404,
            f"model: there is no '{name[:80]}' here, only {', '.join(names)}.",
            "model",
            "model_not_found",
        )
    decoding = decoding_of(body, defaults)
    num_answers = 1 if body.get("n") is None else body["n"]
    if num_answers < 1 or num_answers * len(prompts) > MOST_ANSWERS:
        raise RefusedError(400, f"n: must lie between 1 and {MOST_ANSWERS} answers in all.", "n")
    if num_answers > 1 and not decoding.do_sample:
        raise RefusedError(
            400, "n: answers are not drawn, so all would be the same; set temperature.", "n"
        )
    is_streamed = bool(body.get("stream"))
    options = body.get("stream_options") or {}
    if options and not is_streamed:
        raise RefusedError(400, "stream_options: are for stream: true.", "stream_options")
    if unknown := [key for key in options if key != "include_usage"]:
        raise RefusedError(
            400, f"stream_options: '{unknown[0][:80]}' is not supported.", "stream_options"
        )
    seed = body.get("seed")
    return Wish(
        name=name,
        prompts=prompts,
        is_raw=is_raw,
        decoding=replace(decoding, seed=0),
        seed=defaults.seed if seed is None and is_seeded else seed,
        num_answers=num_answers,
        is_streamed=is_streamed,
        has_usage=bool(options.get("include_usage")),
    )


def decoding_of(body: Mapping[str, Any], defaults: DecodingConfig) -> DecodingConfig:
    """How answers to a request are drawn.

    A temperature of 0 is greedy, whatever else is given; any other temperature, ``top_p`` or
    ``top_k`` draws; with none of them the defaults hold.

    Raises:
        RefusedError: for values that cannot be.
    """
    given = {key: value for key, value in body.items() if value is not None}
    changes: dict[str, Any] = {}
    limits = {given[k] for k in ("max_tokens", "max_completion_tokens") if k in given}
    if len(limits) > 1:
        raise RefusedError(
            400, "max_tokens and max_completion_tokens differ; give one of them.", "max_tokens"
        )
    if limits:
        changes["max_new_tokens"] = limits.pop()
    if "stop" in given:
        changes["stop"] = (given["stop"],) if isinstance(given["stop"], str) else given["stop"]
        changes["stop"] = tuple(changes["stop"])
    changes |= {k: given[k] for k in ("repetition_penalty", "seed") if k in given}
    if given.get("temperature") == 0:
        changes |= {"do_sample": False, **DRAWING}
    elif drawn := {key: given[key] for key in DRAWING if key in given}:
        changes |= {"do_sample": True, **drawn}
    try:
        return replace(defaults, **changes)
    except ConfigurationError as error:
        sentence = error.problems[0].removeprefix("decoding.")
        key, _, rest = sentence.partition(":")
        key = "max_tokens" if key == "max_new_tokens" else key
        raise RefusedError(400, f"{key}:{rest}", key) from error
