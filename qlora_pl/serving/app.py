"""The HTTP interface: who may ask, what is asked, and the way of answers back to the client.

A client that leaves is noticed while it waits and while it is sent pieces; its job then ends at the
next token.
"""

from __future__ import annotations

import asyncio
import copy
import hmac
import json
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qlora_pl.chat.address import is_loopback
from qlora_pl.errors import QLoRAError
from qlora_pl.inference.answering import Answerer, Encoded, TooLong
from qlora_pl.inference.loading import Model, make_encoder
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import RowAnswer
from qlora_pl.serving.engine import Engine
from qlora_pl.serving.refusals import RefusedError, broken
from qlora_pl.serving.replies import Replies, as_line, models
from qlora_pl.serving.rows import Ended, Event, Job, Piece
from qlora_pl.serving.wishes import Wish, read_chat, read_completion

logger = logging.getLogger(__name__)

MOST_BYTES = 4 * 2**20
"""Of a body."""

Read = Callable[[dict[str, Any], list[str], DecodingConfig, bool], Wish]


class Service:
    """What the routes share.

    Args:
        model: What answers.
        engine: Asks it.
        defaults: How answers are drawn where a request does not say.
        is_seeded: Whether the seed of ``defaults`` is meant; else every request has another.
        key: What a client has to show; None: it comes from this machine, by its own name.
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        defaults: DecodingConfig,
        is_seeded: bool,
        key: str | None,
    ) -> None:
        self._engine = engine
        self._defaults = defaults
        self._is_seeded = is_seeded
        self._key = key
        self._names = [*model.adapters, BASE]
        self._began = int(time.time())
        # The thread of the model decodes meanwhile, so requests have a tokenizer of their own.
        tokenizer = copy.deepcopy(model.tokenizer)
        encoder = make_encoder(model.source, tokenizer, model.model)
        self._reader = Model(model.model, tokenizer, encoder, model.source, {})

    def routes(self) -> list[Route]:
        """Addresses and what they do."""
        return [
            Route("/health", self._health, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name}", self._one_model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
        ]

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({"object": "list", "data": models(self._names, self._began)})

    async def _one_model(self, request: Request) -> Response:
        self._admit(request)
        found = [name for name in self._names if name == request.path_params["name"]]
        if not found:
            raise RefusedError(
                404, f"There are only {', '.join(self._names)} here.", "model", "model_not_found"
            )
        return JSONResponse(models(found, self._began)[0])

    async def _chat(self, request: Request) -> Response:
        return await self._reply(request, read_chat)

    async def _completion(self, request: Request) -> Response:
        return await self._reply(request, read_completion)

    async def _reply(self, request: Request, read: Read) -> Response:
        self._admit(request)
        wish = read(await _body(request), self._names, self._defaults, self._is_seeded)
        prompts = self._encode(wish)
        seed = secrets.randbits(31) if wish.seed is None else wish.seed
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        job = Job(
            wish.name,
            wish.decoding,
            lambda event: _hand_over(loop, events, event),
        )
        asked = [one for one in prompts for _ in range(wish.num_answers)]
        self._engine.submit(job, asked, seed)
        replies = Replies(
            wish.name, not wish.is_raw, sum(len(p.ids) for p in prompts), wish.has_usage
        )
        exchange = _Exchange(job, events, len(asked), replies)
        return await (exchange.stream if wish.is_streamed else exchange.whole)(request)

    def _encode(self, wish: Wish) -> list[Encoded]:
        answerer = Answerer(self._reader, wish.decoding, is_raw=wish.is_raw)
        key = "prompt" if wish.is_raw else "messages"
        encoded = []
        for prompt in wish.prompts:
            try:
                one = answerer.encode(prompt)
            except QLoRAError as error:
                raise RefusedError(400, f"{key}: {error}", key) from error
            if isinstance(one, TooLong):
                raise RefusedError(400, one.sentence, key, "context_length_exceeded")
            encoded.append(one)
        return encoded

    def _admit(self, request: Request) -> None:
        """Let in who shows the key, or, where there is none, who asks this machine by its name.

        Without a key a page in a browser could ask by a name that it makes lead here.
        """
        if self._key is not None:
            kind, _, shown = request.headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(shown.strip().encode(), self._key.encode())
            if kind.lower() != "bearer" or not is_right:
                raise RefusedError(
                    401,
                    "This server asks for its key, as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )
        elif not is_own_name(request.url.hostname or ""):
            raise RefusedError(
                403, "Ask this server at localhost, or start it with a key.", code="wrong_host"
            )


class _Exchange:
    """One request that is being answered."""

    def __init__(
        self, job: Job, events: asyncio.Queue[Event], num_answers: int, replies: Replies
    ) -> None:
        self._job = job
        self._events = events
        self._answers: dict[int, RowAnswer] = {}
        self._num_answers = num_answers
        self._replies = replies
        self._began = time.perf_counter()

    async def whole(self, request: Request) -> Response:
        """All answers at once."""
        try:
            while not self._is_done:
                event = await self._next_or_leave(request)
                if isinstance(event, RefusedError):
                    raise event
        finally:
            self._leave()
        return JSONResponse(self._replies.whole(self._in_order))

    async def stream(self, request: Request) -> Response:
        """Pieces as they come; the status waits for the first, so that failures have their own."""
        try:
            first = await self._next_or_leave(request)
            if isinstance(first, RefusedError):
                raise first
        except BaseException:
            self._leave()
            raise
        return StreamingResponse(
            self._lines(first),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )

    async def _lines(self, first: Piece | Ended) -> AsyncIterator[str]:
        try:
            yield self._replies.beginning(self._num_answers)
            yield self._replies.event(first)
            while not self._is_done:
                event = await self._next()
                if isinstance(event, RefusedError):
                    yield as_line(event.as_dict())
                    return
                yield self._replies.event(event)
            yield self._replies.ending(self._in_order)
        finally:
            self._leave()

    async def _next(self) -> Event:
        event = await self._events.get()
        if isinstance(event, Ended):
            self._answers[event.index] = event.answer
        return event

    async def _next_or_leave(self, request: Request) -> Event:
        """The next event.

        Raises:
            ClientDisconnect: if the client leaves first.
        """
        event = asyncio.ensure_future(self._next())
        gone = asyncio.ensure_future(_wait_until_gone(request))
        try:
            done, _ = await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (event, gone):
                task.cancel()
        if event not in done:
            raise ClientDisconnect
        return event.result()

    def _leave(self) -> None:
        """Nobody waits any more; what was done, in numbers."""
        self._job.has_left = True
        usage = self._replies.usage(self._in_order)
        logger.info(
            "%s: %d of %d answered, %d + %d tokens, %.1f s",
            self._job.name,
            len(self._answers),
            self._num_answers,
            usage["prompt_tokens"],
            usage["completion_tokens"],
            time.perf_counter() - self._began,
        )

    @property
    def _is_done(self) -> bool:
        return len(self._answers) == self._num_answers

    @property
    def _in_order(self) -> list[RowAnswer]:
        return [self._answers[index] for index in sorted(self._answers)]


def make_app(service: Service) -> Starlette:
    """The application."""
    app = Starlette(routes=[_told(route) for route in service.routes()])
    app.add_exception_handler(HTTPException, _no_such_address)
    return app


def is_own_name(host: str) -> bool:
    """Whether a name can only mean this machine."""
    return host.lower().endswith(".localhost") or is_loopback(host)


def _told(route: Route) -> Route:
    """The route with its refusals and failures as replies."""
    act: Callable[[Request], Awaitable[Response]] = route.endpoint

    async def answer(request: Request) -> Response:
        try:
            return await act(request)
        except RefusedError as error:
            refusal = error
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            # Without the message, which may quote what was asked.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("A request failed with %s:\n%s", type(error).__name__, where)
            refusal = broken()
        headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
        return JSONResponse(refusal.as_dict(), refusal.status, headers)

    return Route(route.path, answer, methods=sorted(route.methods or ()))


async def _no_such_address(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    refusal = RefusedError(
        status, f"There is no {request.method} of this address; see docs/inference.md."
    )
    return JSONResponse(refusal.as_dict(), status)


async def _body(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another origin may not send unasked
        raise RefusedError(400, "The body must be JSON, as 'Content-Type: application/json'.")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise RefusedError(413, f"The body is larger than {MOST_BYTES} bytes.")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "The body is not JSON.") from error
    if not isinstance(body, dict):
        raise RefusedError(400, "The body must be an object of JSON.")
    return body


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """From the thread of the model to that of the requests."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
