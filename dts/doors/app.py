"""The routes of the server: /v1/models, /v1/completions and /v1/chat/completions, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dts.doors.answers import answer_of, as_body, as_stream, event, now, progress
from dts.doors.bodies import Asked, Body, ChatBody, CompletionBody, Limits, asked_for, parsed
from dts.doors.choices import AnyReward
from dts.doors.worker import Busy, Job, Worker, public_error
from dts.errors import UsageError, shown
from dts.results import Result, Rollout

SLOWEST_BODY = 30.0  # seconds that a body may take to arrive
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "too_many_requests"}
Events = asyncio.Queue[Rollout | list[Result] | Exception]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code or CODES.get(status)


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes share."""

    worker: Worker
    name: str  # of the model, to clients
    rewards: Mapping[str, AnyReward] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    key: str | None = None
    hosts: frozenset[str] | None = None  # names by which clients may call it; None for all
    started: int = field(default_factory=now)


def build_app(service: Service) -> FastAPI:
    """The application. Closing it ends the worker."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    def key_given(request: Request) -> None:
        check_host(request, service.hosts)
        check_key(request, service.key)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan, dependencies=[Depends(key_given)])
    _add_errors(app)
    entry = {"id": service.name, "object": "model", "created": service.started, "owned_by": "local",
             "rewards": sorted(service.rewards)}  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, service)
        return entry

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        return await answered(request, CompletionBody, service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await answered(request, ChatBody, service)

    return app


# -- errors ------------------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Any) -> Response:
        return error_response(error.status, str(error), error.code)

    async def http(_: Request, error: Any) -> Response:
        return error_response(error.status_code, str(error.detail), None, error.headers)

    async def unexpected(_: Request, error: Any) -> Response:
        return error_response(500, "the server failed on this request; its log says why", None)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def error_response(status: int, message: str, code: str | None, headers: Mapping[str, str] | None = None) -> Response:
    wait = {"Retry-After": "1"} if status in (429, 503) else {}
    return JSONResponse(error_body(status, message, code), status, {**wait, **(headers or {})})


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    plain = message.encode("utf-8", "backslashreplace").decode()  # messages quote what came, half characters too
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": plain, "type": kind, "param": None, "code": code or CODES.get(status)}}


# -- what comes in -----------------------------------------------------------------------------------------------------


def check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
        raise Refused(401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'")


def check_host(request: Request, hosts: frozenset[str] | None) -> None:
    """A web page whose own name was pointed at this machine sends that name."""
    try:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname  # `request.url` replaces odd ones
    except ValueError:  # brackets that do not close
        host = None
    if hosts is not None and host not in hosts:
        raise Refused(403, "the Host header names another host; use the address that the server was started with")


def check_model(name: str, service: Service) -> None:
    if name != service.name:
        raise Refused(404, f"there is no model {shown(name)}; this server has {service.name}", code="model_not_found")


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. JSON only: a web page can send other types to a server on this machine without being asked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(400, "the body has to be JSON, with the header 'Content-Type: application/json'")
    try:
        return await asyncio.wait_for(_limited(request, limit), SLOWEST_BODY)
    except asyncio.TimeoutError:
        raise Refused(400, f"the body did not arrive within {SLOWEST_BODY:g} seconds") from None
    except ClientDisconnect:
        raise Refused(400, "the connection was closed before the body was complete") from None


async def _limited(request: Request, limit: int) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise Refused(413, f"the body is larger than the {limit} bytes that this server takes")
    return bytes(data)


# -- what goes out -----------------------------------------------------------------------------------------------------


async def answered(request: Request, kind: type[Body], service: Service) -> Response:
    """A completion, whole or as a stream."""
    data = await read_body(request, service.limits.body_bytes)
    try:
        body = parsed(kind, data)
        check_model(body.model, service)
        asked = asked_for(body, service.rewards, service.limits)
    except UsageError as error:
        raise Refused(400, str(error)) from error
    job, events = _submitted(asked, service)
    chat = isinstance(body, ChatBody)
    if not body.stream:
        return await _whole(request, job, events, service, chat)
    first = await _while_connected(request, job, events.get(), service)
    if isinstance(first, Exception):  # before anything was sent
        raise _refusal(first)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    return _Stream(_streamed(first, job, events, service, chat, with_usage), lambda: service.worker.stop(job))


class _Stream(StreamingResponse):
    """Calls `end` whatever ends the answer. The parts cannot: of a client that is gone by now none is asked for."""

    def __init__(self, parts: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def _submitted(asked: Asked, service: Service) -> tuple[Job, Events]:
    loop, events = asyncio.get_running_loop(), Events()

    def tell(told: Rollout | list[Result] | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(events.put_nowait, told)

    job = Job(asked, time.monotonic() + service.limits.seconds, tell)
    try:
        service.worker.submit(job)
    except Busy:
        raise Refused(429, f"{service.limits.waiting} requests wait already; try again later") from None
    return job, events


async def _whole(request: Request, job: Job, events: Events, service: Service, chat: bool) -> Response:
    async def end() -> list[Result] | Exception:
        while isinstance(told := await events.get(), Rollout):
            pass
        return told

    outcome = await _while_connected(request, job, end(), service)
    if isinstance(outcome, Exception):
        raise _refusal(outcome)
    return JSONResponse(await asyncio.to_thread(_body_of, outcome, job.asked, service, chat))


def _body_of(results: list[Result], asked: Asked, service: Service, chat: bool) -> dict[str, Any]:
    return as_body(answer_of(asked, results, chat=chat, model=service.name, decode=service.worker.lm.decode))


async def _while_connected(request: Request, job: Job, waited: Awaitable[Any], service: Service) -> Any:
    """What is waited for. A client that hangs up stops the search."""
    result, gone = asyncio.ensure_future(waited), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise Refused(400, "the client hung up")
        return result.result()
    finally:
        for task in (result, gone):
            task.cancel()
        if not result.done() or result.cancelled():
            service.worker.stop(job)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: Exception) -> Refused:
    return Refused(*public_error(error))


async def _streamed(
    told: Rollout | list[Result] | Exception, job: Job, events: Events, service: Service, chat: bool, with_usage: bool
) -> AsyncIterator[str]:
    """Comments while the search runs, then the texts."""
    best, reward = "", float("-inf")
    while isinstance(told, Rollout):
        if told.reward > reward:
            best, reward = told.text, told.reward
        yield progress(told, best)
        told = await events.get()
    if isinstance(told, Exception):
        yield event(error_body(*public_error(told)))
        return
    answer = answer_of(job.asked, told, chat=chat, model=service.name, decode=service.worker.lm.decode)
    for part in as_stream(answer, with_usage=with_usage):
        yield part
