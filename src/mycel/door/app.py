"""The routes: OpenAI's completions, chat and models, and what operators look at."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mycel.door.answers import Writer
from mycel.door.guessing import ROUTE, fingerprint
from mycel.door.journal import Journal
from mycel.door.metrics import Metrics
from mycel.door.schema import MOST_BODY, ChatBody, CompletionBody, Refused, parse
from mycel.door.work import Work, chat_work, completion_work
from mycel.errors import BusyError, GenerationError, MycelError, ParcelError, UnknownModel
from mycel.generation.request import Spans
from mycel.generation.served import Served
from mycel.serve.edge_draft import read_question

Handler = Callable[[HttpRequest], Awaitable[Response]]


class Door:
    """An ASGI application over a served model.

    Parameters
    ----------
    served : Served
        What answers.
    keys : sequence of str
        Keys of which a client must bring one; none: everybody is let in.
    journal : Journal, optional
        Where requests are written down.
    """

    def __init__(self, served: Served, keys: Sequence[str] = (), journal: Journal | None = None) -> None:
        self.served = served
        self.metrics = Metrics(served.backend, journal)
        self.started = int(time.time())
        self._tokenizer = fingerprint(served.tokenizer)
        self._silent = Writer(False, served.name, served.tokenizer, False, 0)
        self._keys = [key.encode() for key in keys]
        routes = [
            Route("/v1/models", self._guarded("models", self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded("model", self._model), methods=["GET"]),
            Route("/v1/completions", self._guarded("completions", self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded("chat", self._chat), methods=["POST"]),
            Route(ROUTE, self._guarded("speculation", self._verify), methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        self.app = Starlette(routes=routes, exception_handlers={404: _not_found, 405: _not_found})

    def _guarded(self, route: str, handler: Handler) -> Handler:
        """Check the key, and make an answer of every error."""

        async def answer(http: HttpRequest) -> Response:
            try:
                self._check_key(http)
                response = await handler(http)
            except ClientDisconnect:
                self.metrics.left()
                response = Response(status_code=499)
            except Refused as error:
                response = refusal(error.status, error.message, error.field, error.code)
            except UnknownModel as error:
                response = refusal(404, str(error), "model", "model_not_found")
            except BusyError as error:
                response = refusal(429, str(error), code="busy")
                response.headers["Retry-After"] = str(error.seconds)
            except GenerationError as error:
                response = refusal(503 if "engine failed" in str(error) else 400, str(error))
            except MycelError as error:
                response = refusal(500, str(error))
            self.metrics.answered(route, response.status_code)
            return response

        return answer

    def _check_key(self, http: HttpRequest) -> None:
        if not self._keys:
            return
        kind, _, given = http.headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if kind.lower() != "bearer" or not any(known):
            raise Refused(401, "this server needs a key: send 'Authorization: Bearer KEY'", code="invalid_api_key")

    async def _completions(self, http: HttpRequest) -> Response:
        spans = Spans()
        body = parse(CompletionBody, await read_body(http))
        adapter = await self.served.adapter_of(body.model)
        spans.parsed = time.monotonic()
        return await self._serve(http, completion_work(self.served, body, adapter, spans), body)

    async def _chat(self, http: HttpRequest) -> Response:
        spans = Spans()
        body = parse(ChatBody, await read_body(http))
        adapter = await self.served.adapter_of(body.model)
        spans.parsed = time.monotonic()
        return await self._serve(http, chat_work(self.served, body, adapter, spans), body)

    async def _verify(self, http: HttpRequest) -> Response:
        """Say which of an edge's guesses stand."""
        spans = Spans()
        try:
            model, request = read_question(await read_body(http), self.served.backend.vocabulary)
        except ParcelError as error:
            raise Refused(400, str(error)[:300]) from error
        adapter = await self.served.adapter_of(model)
        spans.parsed = time.monotonic()
        work = Work(self.served, [(replace(request, adapter=adapter), "")], self._silent, spans)
        return Response(await work.verdict(http, self.metrics), media_type="application/octet-stream")

    async def _serve(self, http: HttpRequest, work: Work, body: CompletionBody | ChatBody) -> Response:
        work.check()
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return await work.streamed(http, self.metrics, usage)
        return Response(await work.whole(http, self.metrics), media_type="application/json")

    async def _models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._about(name) for name in self.served.names()]})

    async def _model(self, http: HttpRequest) -> Response:
        name = str(http.path_params["name"])
        if name not in self.served.names():
            raise UnknownModel(f"the model {name[:100]!r} is not served here: GET /v1/models lists what is")
        return JSONResponse(self._about(name))

    def _about(self, name: str) -> dict[str, Any]:
        parent = self.served.name if name != self.served.name else None
        about = {"id": name, "object": "model", "created": self.started, "owned_by": "mycel", "parent": parent}
        return {**about, "max_model_len": self.served.backend.context, "tokenizer": self._tokenizer}

    async def _health(self, http: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": self.served.name})

    async def _metrics(self, http: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


def refusal(status: int, message: str, field: str | None = None, code: str | None = None) -> Response:
    """Return an error in the interface's form."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    # Texts may hold half of a surrogate pair, which UTF-8 cannot say and JSON's escapes can.
    content = json.dumps({"error": {"message": message, "type": kind, "param": field, "code": code}})
    return Response(content, status, media_type="application/json")


async def read_body(http: HttpRequest) -> bytes:
    """Read a body, up to the limit, and no byte further."""
    length = http.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MOST_BODY:
        raise Refused(413, f"the body has {length} bytes: send at most {MOST_BODY}")
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > MOST_BODY:
            raise Refused(413, f"the body has more than {MOST_BODY} bytes: send fewer")
        parts.append(part)
    return b"".join(parts)


async def _not_found(http: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return refusal(status, f"{http.method} {http.url.path[:100]} is not served here: see /v1/models")
