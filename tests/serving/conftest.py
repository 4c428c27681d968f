"""A server over the trained adapter, in a thread of this process, and OpenAI's own client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from trained import CPU, adapter, other_base, run, type_in

from qlora_pl.inference.loading import Model, load
from qlora_pl.inference.source import ModelChoice, resolve_source
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.serving.app import Service, make_app
from qlora_pl.serving.command import address_of, listen
from qlora_pl.serving.engine import Engine

__all__ = ["adapter", "other_base", "run", "type_in"]


class Served:
    """A running server."""

    def __init__(self, engine: Engine, address: str, model: Model, server: uvicorn.Server) -> None:
        self.engine = engine
        self.address = address
        self.model = model
        self.server = server

    def client(self, key: str = "none", **changes: Any) -> openai.OpenAI:
        """OpenAI's client, which is not to try again by itself."""
        settings = {"base_url": self.address, "max_retries": 0, "timeout": 120} | changes
        return openai.OpenAI(api_key=key, **settings)


@contextmanager
def serving(
    model: Model,
    batch_size: int = 8,
    key: str | None = None,
    is_seeded: bool = False,
    **decoding: Any,
) -> Iterator[Served]:
    """A server in a thread, at a free port."""
    engine = Engine(model, batch_size)
    defaults = DecodingConfig(**{"max_new_tokens": 10} | decoding)
    app = make_app(Service(model, engine, defaults, is_seeded, key))
    place = listen("127.0.0.1", 0, has_key=False)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(engine, address_of(place), model, server)
    finally:
        engine.close()
        server.should_exit = True
        thread.join(timeout=60)
        engine.join()
        place.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def own_model(adapter: Path) -> Model:
    """What answers, for servers alone: two adapters of one base."""
    words = (f"small={adapter}", f"other={adapter}")
    return load(resolve_source(ModelChoice(adapter=words)), CPU)


@pytest.fixture(scope="session")
def served(own_model: Model) -> Iterator[Served]:
    """A server with its defaults."""
    with serving(own_model) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    """Of that server."""
    with served.client() as one:
        yield one


def wait_for(holds: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether something comes to hold in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return False
