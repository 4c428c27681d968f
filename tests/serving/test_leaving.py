"""A client that leaves, and a server that ends, stop what is being written."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from qlora_pl.inference.loading import Model
from qlora_pl.serving.rows import BatchStreamer

from .conftest import Served, serving, wait_for

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # a run happens in this process

QUESTION: Any = [{"role": "user", "content": "How many legs?"}]
LONG: dict[str, Any] = {"model": "small", "messages": QUESTION, "max_tokens": 200}
"""The tiny model never ends by itself that early."""


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each token, of which there are about fifty in a second."""
    put, seen = BatchStreamer.put, []

    def slowly(self: BatchStreamer, value: Any) -> None:
        put(self, value)
        seen.append(len(value))
        time.sleep(0.02)

    monkeypatch.setattr(BatchStreamer, "put", slowly)
    return seen


@pytest.fixture
def slow(own_model: Model, put: list[int]) -> Iterator[Served]:
    """A server that takes four seconds for 200 tokens."""
    with serving(own_model) as running:
        yield running


def is_still(put: list[int]) -> bool:
    """Whether no more tokens come."""
    before = len(put)
    time.sleep(0.2)
    return len(put) == before


def test_a_client_that_leaves_in_mid_stream_stops_its_answer(slow: Served, put: list[int]) -> None:
    with slow.client() as client:
        stream = client.chat.completions.create(stream=True, **LONG)
        for place, _ in enumerate(stream):
            if place == 3:
                break
        stream.close()
    assert wait_for(lambda: is_still(put))
    assert 3 < len(put) < 100
    with slow.client() as client:  # and the next is answered
        assert client.chat.completions.create(**{**LONG, "max_tokens": 2}).choices


def test_a_client_that_leaves_while_it_waits_for_a_whole_answer_stops_it(
    slow: Served, put: list[int]
) -> None:
    connection = http.client.HTTPConnection(urlsplit(slow.address).netloc, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(LONG), headers)
    assert wait_for(lambda: len(put) > 3)
    connection.close()
    assert wait_for(lambda: is_still(put))
    assert len(put) < 100


def test_a_client_that_leaves_before_its_turn_is_never_asked_for(
    slow: Served, put: list[int]
) -> None:
    with slow.client() as client, slow.client(timeout=0.3) as impatient:
        stream = client.chat.completions.create(stream=True, **{**LONG, "max_tokens": 20})
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(temperature=1.0, **LONG)
        assert len(list(stream)) > 5
    assert wait_for(lambda: is_still(put))
    assert len(put) == 21  # the prompt and its tokens


def test_who_stays_gets_a_whole_answer_when_another_of_the_batch_leaves(
    slow: Served, put: list[int]
) -> None:
    with slow.client() as client, slow.client() as other:
        first = client.chat.completions.create(stream=True, **{**LONG, "max_tokens": 8})
        second = threading.Thread(
            target=lambda: next(iter(other.chat.completions.create(stream=True, **LONG)))
        )
        second.start()
        found: list[str] = []
        third = threading.Thread(
            target=lambda: found.append(
                str(client.chat.completions.create(**LONG).choices[0].message.content)
            )
        )
        third.start()
        list(first)
        second.join()
        other.close()
        third.join()
    assert max(put) == 2  # both were of one batch
    assert len(found[0]) > 50


def test_a_server_that_ends_stops_its_answers_and_says_so(own_model: Model, put: list[int]) -> None:
    with serving(own_model) as running, running.client() as client:
        stream = client.chat.completions.create(stream=True, **LONG)
        next(iter(stream))
        waiting: list[Any] = []

        def wait() -> None:
            with pytest.raises(openai.InternalServerError) as caught, running.client() as one:
                one.chat.completions.create(temperature=1.0, **LONG)
            waiting.append(caught.value)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.3)
        running.engine.close()
        with pytest.raises(openai.APIError, match="The server is stopping"):
            list(stream)
        thread.join()
        assert waiting[0].status_code == 503
        assert "The server is stopping" in waiting[0].message
        with pytest.raises(openai.InternalServerError, match="The server is stopping"):
            client.chat.completions.create(**LONG)
    assert len(put) < 100
