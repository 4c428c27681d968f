"""What gets no answer gets a sentence in OpenAI's format, and the server goes on."""

from __future__ import annotations

import http.client
import json
import logging
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch

from qlora_pl.serving import engine as engine_module

from .conftest import Served, serving

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # a run happens in this process

QUESTION = [{"role": "user", "content": "How many legs?"}]
CHAT = "/v1/chat/completions"


def post(served: Served, body: Any, path: str = CHAT, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and body of what comes back for bytes, or for an object as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(served.address).netloc, timeout=60)
    sent = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.request("POST", path, data, sent)
    reply = connection.getresponse()
    found = json.loads(reply.read())
    connection.close()
    return reply.status, found


@pytest.mark.parametrize(
    ("changes", "key", "sentence"),
    [
        ({"model": None}, "model", "model: is missing"),
        ({"messages": None}, "messages", "messages: is missing"),
        ({"messages": []}, "messages", "must be a list of messages"),
        ({"messages": "Why?"}, "messages", "must be a list of messages"),
        ({"messages": ["Why?"]}, "messages", "message 1 has no content"),
        ({"messages": [{"role": "user"}]}, "messages", "message 1 has no content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no role of system, user"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "expected 'user'"),
        ({"messages": [*QUESTION, *QUESTION]}, "messages", "message 2 is from 'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "parts that are no text",
        ),
        (
            {"messages": [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "messages",
            "'tool_calls' of message 2",
        ),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"temperature": -1}, "temperature", "must be above 0, got -1"),
        ({"temperature": 1e400}, "temperature", "must be a number"),
        ({"top_p": 0}, "top_p", "must lie above 0, up to 1"),
        ({"top_p": 1.5}, "top_p", "must lie above 0, up to 1"),
        ({"max_tokens": 0}, "max_tokens", "must be at least 1"),
        ({"max_tokens": 2.5}, "max_tokens", "must be a whole number"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"seed": -1}, "seed", "must be 0 or more"),
        ({"seed": 1.5}, "seed", "must be a whole number"),
        ({"stop": [""]}, "stop", "would end every answer"),
        ({"stop": [3]}, "stop", "must be a text"),
        ({"n": 0, "temperature": 1}, "n", "between 1 and 128"),
        ({"n": 129, "temperature": 1}, "n", "between 1 and 128"),
        ({"n": 2}, "n", "all would be the same"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "are for stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "'x' is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "repetition_penalty is what"),
        ({"presence_penalty": 0.5}, "presence_penalty", "is not supported here"),
        ({"logprobs": True}, "logprobs", "is not supported here"),
        ({"top_logprobs": 2}, "top_logprobs", "is not supported here"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported here"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported here"),
        ({"response_format": {"type": "json_object"}}, "response_format", "say in the prompt"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"best_of": 2}, "best_of", "use n"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
def test_what_is_wrong_or_not_supported_is_named(
    served: Served, changes: dict[str, Any], key: str, sentence: str
) -> None:
    status, found = post(served, {"model": "small", "messages": QUESTION} | changes)
    assert status == 400
    assert found["error"]["param"] == key
    assert sentence in found["error"]["message"]
    assert found["error"]["type"] == "invalid_request_error"
    assert "How many legs" not in json.dumps(found)


@pytest.mark.parametrize(
    "nothing",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "logit_bias": {}},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "n": 1},
        {"temperature": None, "stop": None, "user": "me", "metadata": {"a": "b"}, "seed": None},
    ],
)
def test_what_asks_for_nothing_is_let_through(served: Served, nothing: dict[str, Any]) -> None:
    plain = {"model": "small", "messages": QUESTION}
    status, found = post(served, plain | nothing)
    assert status == 200
    assert found["choices"] == post(served, plain)[1]["choices"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "sentence"),
    [
        (b"{", {}, 400, "The body is not JSON."),
        (b"\xff\xfe", {}, 400, "The body is not JSON."),
        (b"[" * 100_000, {}, 400, "The body is not JSON."),
        (b"[]", {}, 400, "must be an object of JSON"),
        (b"", {}, 400, "The body is not JSON."),
        (b"{}", {"Content_Type": "text/plain"}, 400, "must be JSON, as 'Content-Type:"),
        (b" " * (5 * 2**20), {}, 413, "larger than"),
    ],
    ids=["cut", "no text", "deep", "list", "empty", "plain", "large"],
)
def test_a_body_that_is_no_request_is_refused(
    served: Served, body: bytes, headers: dict[str, str], status: int, sentence: str
) -> None:
    found = post(served, body, **headers)
    assert found[0] == status
    assert sentence in found[1]["error"]["message"]


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-4' here, only small, other"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError, match="only small, other, base"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="no POST of this address"):
        client.embeddings.create(model="small", input="x")
    with pytest.raises(openai.BadRequestError, match="prompt: must be a text"):
        client.completions.create(model="small", prompt=[1, 2])


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_prompt_that_is_too_long_is_told_with_its_tokens_and_the_limit(
    client: openai.OpenAI, is_streamed: bool
) -> None:
    """The tiny model reads 256 tokens."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": "secret " * 300}],
            stream=is_streamed,
        )
    assert caught.value.code == "context_length_exceeded"
    assert "the prompt has " in caught.value.message
    assert "together may have 256" in caught.value.message
    assert "secret" not in caught.value.message


# -- when the model fails --------------------------------------------------------------------------


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), openai.InternalServerError, 503),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            openai.InternalServerError,
            503,
        ),
        (ValueError("about: How many legs?"), openai.InternalServerError, 500),
    ],
    ids=["gpu", "cpu", "defect"],
)
def test_a_failure_ends_one_request_and_not_the_server(
    served: Served,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_streamed: bool,
    error: Exception,
    kind: type[openai.APIStatusError],
    code: int,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    words: dict[str, Any] = {"model": "small", "messages": QUESTION, "stream": is_streamed}
    with monkeypatch.context() as broken:
        broken.setattr(engine_module, "answer_batch", fail)
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**words)
    assert caught.value.status_code == code
    assert ("ran out of memory" in caught.value.message) is (code == 503)
    client.chat.completions.create(**words)
    assert "How many legs" not in caplog.text
    assert ("ValueError" in caplog.text) is (code == 500)


def test_a_failure_in_mid_stream_is_told_in_the_stream(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_pl.serving.rows import BatchStreamer

    put, seen = BatchStreamer.put, []

    def fail_later(self: BatchStreamer, value: Any) -> None:
        put(self, value)
        seen.append(value)
        if len(seen) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(BatchStreamer, "put", fail_later)
    stream = client.chat.completions.create(
        model="small",
        messages=QUESTION,  # type: ignore[arg-type]
        stream=True,
    )
    pieces = (chunk.choices[0].delta.content for chunk in stream)
    assert next(piece for piece in pieces if piece)
    with pytest.raises(openai.APIError, match="ran out of memory"):
        list(pieces)


def test_a_batch_that_does_not_fit_is_asked_in_halves(
    own_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch of more than two rows fails; eight answers come all the same."""
    answer, sizes = engine_module.answer_batch, []

    def fail_when_large(*given: Any, **words: Any) -> Any:
        sizes.append(len(given[2]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer(*given, **words)

    words: dict[str, Any] = {"model": "small", "messages": QUESTION, "n": 8, "seed": 1}
    words |= {"temperature": 1.5}
    with serving(own_model) as running, running.client() as client:
        whole = client.chat.completions.create(**words)
        monkeypatch.setattr(engine_module, "answer_batch", fail_when_large)
        pieces = client.chat.completions.create(**words)
    assert [c.message.content for c in pieces.choices] == [c.message.content for c in whole.choices]
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


# -- who may ask -----------------------------------------------------------------------------------

KEY = "correct-horse-battery"


def test_with_a_key_nobody_asks_without_it(
    own_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(own_model, key=KEY) as running:
        for wrong in ("none", KEY[:-1], f"{KEY}x", KEY.upper()):
            with running.client(key=wrong) as client:
                with pytest.raises(openai.AuthenticationError, match="asks for its key"):
                    client.models.list()
                with pytest.raises(openai.AuthenticationError) as caught:
                    client.chat.completions.create(model="small", messages=QUESTION)  # type: ignore
                assert KEY not in str(caught.value)
        with running.client(key=KEY) as client:
            assert len(client.models.list().data) == 3
        body = {"model": "small", "messages": QUESTION}
        assert post(running, body)[0] == 401
        assert post(running, body, Authorization=KEY)[0] == 401
        assert post(running, body, Authorization=f"Basic {KEY}")[0] == 401
        assert post(running, body, Authorization=f"bearer {KEY}", Host="model.example")[0] == 200
        assert post(running, b"{", Authorization="Bearer caf\xe9")[0] == 401
    assert KEY not in caplog.text


def test_without_a_key_it_answers_only_to_a_name_of_this_machine(served: Served) -> None:
    """A page in a browser may have made its own name lead to the loopback address."""
    body = {"model": "small", "messages": QUESTION}
    assert post(served, body, Host="evil.example")[0] == 403
    for name in ("localhost", "localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert post(served, body, Host=name)[0] == 200


def test_health_needs_no_key(own_model: Any) -> None:
    with serving(own_model, key=KEY) as running:
        connection = http.client.HTTPConnection(urlsplit(running.address).netloc, timeout=60)
        connection.request("GET", "/health")
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())) == (200, {"status": "ok"})
        connection.close()
