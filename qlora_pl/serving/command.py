"""``qlora-pl serve``: its flags, and what is made sure of before weights are loaded."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.flags import Flags
from qlora_pl.inference.source import ModelChoice, resolve_source
from qlora_pl.modeling.answers.decoding import DecodingConfig

logger = logging.getLogger(__name__)

DESCRIPTION = """Answer HTTP requests in OpenAI's format with an adapter (or a model alone), through
the template it was trained with: chat completions, streamed or whole, and completions of raw text.
For tests and small use. Ctrl-C ends it."""
KEY_VARIABLE = "QLORA_PL_API_KEY"
"""Holds what clients have to show."""
LIBRARIES = ("starlette", "uvicorn")
LEAVE_SECONDS = 10
"""That clients have to take what is left of their answers, when the server ends."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where requests come from."""

    host: str = "127.0.0.1"
    """The address to listen at. Any but this machine's own asks clients for the key in the
    environment variable QLORA_PL_API_KEY."""
    port: int = 8000
    """The port to listen at; 0: a free one."""
    batch_size: int = 8
    """Answers at a time, of requests that wait with the same settings; 1: one after another."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.port <= 65535:
            problems.append(f"--port: must lie between 0 and 65535, got {self.port}.")
        if self.batch_size < 1:
            problems.append(f"--batch-size: must be at least 1, got {self.batch_size}.")
        if problems:
            raise ConfigurationError(problems)


def flags() -> Flags:
    """The command's flags."""
    parser = Flags("serve", DESCRIPTION)
    parser.add_settings(ModelChoice, "which model answers")
    parser.add_settings(ServeOptions, "where requests come from")
    parser.add_settings(DecodingConfig, "how answers are drawn where a request does not say")
    return parser


def serve_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``serve``.

    Raises:
        QLoRAError: for a mistake in words, folders or the address, before weights are loaded.
    """
    parser = flags()
    given = parser.parse(words)
    choice = ModelChoice(**parser.settings(ModelChoice, given))
    options = ServeOptions(**parser.settings(ServeOptions, given))
    drawn = parser.settings(DecodingConfig, given)
    decoding = DecodingConfig(**drawn)
    if decoding.num_beams > 1:
        raise ConfigurationError(
            "--num-beams: a beam search knows its answer only at the end, and answers are sent as "
            "they come; leave it out."
        )
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise ConfigurationError(
            f"serve needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed; run: pip install 'qlora-pl[serve]'"
        )
    key = read_key(os.environ)
    source = resolve_source(choice)
    with listen(options.host, options.port, key is not None) as place:
        for assumed in source.assumed:
            logger.warning("No file says it, so this is assumed: %s.", assumed)
        # Imported here: a mistake in the flags is told at once.
        from qlora_pl.inference.loading import load
        from qlora_pl.inference.machine import place_of

        model = load(source, place_of(choice), choice.cache_dir, choice.trust_remote_code)
        serve(model, place, options.batch_size, decoding, "seed" in drawn, key)
    return 0


def serve(
    model: Any,
    place: socket.socket,
    batch_size: int,
    decoding: DecodingConfig,
    is_seeded: bool,
    key: str | None,
) -> None:
    """Answer requests until SIGINT or SIGTERM; what is being answered then ends at its next token.

    Args:
        model: From ``load``.
        place: From ``listen``.
        batch_size: Answers at a time.
        decoding: How answers are drawn where a request does not say.
        is_seeded: Whether its seed is meant.
        key: What clients have to show, if anything.
    """
    import uvicorn

    from qlora_pl.serving.app import Service, make_app
    from qlora_pl.serving.engine import Engine

    engine = Engine(model, batch_size)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            engine.close()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        make_app(Service(model, engine, decoding, is_seeded, key)),
        access_log=False,
        log_config=None,
        log_level="warning",
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=LEAVE_SECONDS,
    )
    logger.info("Listening at %s for %s.", address_of(place), ", ".join([*model.adapters, "base"]))
    # uvicorn raises the signals that it was ended by once more when it is done.
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(config).run(sockets=[place])
    finally:
        engine.join()
        for one, handler in before.items():
            signal.signal(one, handler)


def read_key(environment: Mapping[str, str]) -> str | None:
    """The key that clients have to show.

    Raises:
        ConfigurationError: if it is one that no client can send.
    """
    key = environment.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            f"{KEY_VARIABLE}: is empty, or has characters that no header can hold; use letters and "
            "digits, or unset it."
        )
    return key


def listen(host: str, port: int, has_key: bool) -> socket.socket:
    """A socket that takes connections; they wait there until the model is loaded.

    Raises:
        ConfigurationError: if the address is not this machine's, or taken, or open to others and
            there is no key.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigurationError(
            f"--host: '{host}' is no address of this machine ({error.strerror})."
        ) from error
    family, kind, protocol, _, address = found[0]
    if not has_key and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigurationError(
            f"--host: '{host}' can be reached from other machines; set a key that clients have to "
            f"show in the environment variable {KEY_VARIABLE}, or listen at 127.0.0.1."
        )
    place = socket.socket(family, kind, protocol)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
        place.listen(128)
    except OSError as error:
        place.close()
        raise ConfigurationError(
            f"--port: {host}:{port} cannot be listened at ({error.strerror}); choose another."
        ) from error
    return place


def address_of(place: socket.socket) -> str:
    """Where clients of OpenAI's format find it."""
    host, port = place.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
