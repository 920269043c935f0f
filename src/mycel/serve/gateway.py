"""A gateway as many are written, the baseline of ``scalellm``: it reads, checks and writes again whatever passes.

Requests are validated field by field and written anew for the server behind; every piece of a stream is parsed,
validated and written anew for the client. Beside it, clients that take next to no time themselves.

``python -m mycel.serve.gateway http://127.0.0.1:8000`` stands before a server of ``mycel serve``.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

import httpx
import uvicorn
from pydantic import BaseModel, ConfigDict
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mycel.errors import EngineError


class Asked(BaseModel):
    """A completion's request."""

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str | list[str]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stream: bool = False
    stop: str | list[str] | None = None
    seed: int | None = None


class Choice(BaseModel):
    """One continuation, or a piece of it."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Usage(BaseModel):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """A completion's answer, or a piece of it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


def conventional(address: str) -> Starlette:
    """Return the gateway before the server at ``address``."""
    client = httpx.AsyncClient(base_url=address, timeout=httpx.Timeout(None), limits=httpx.Limits(max_connections=None))

    async def pieces(answer: httpx.Response) -> AsyncIterator[str]:
        try:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    yield f"data: {Answer.model_validate_json(line[6:]).model_dump_json()}\n\n"
                elif line:
                    yield f"{line}\n\n"
        finally:
            await answer.aclose()

    async def completions(http: Request) -> Response:
        asked = Asked.model_validate(await http.json())
        content = asked.model_dump(exclude_none=True)
        request = client.build_request("POST", "/v1/completions", json=content)
        answer = await client.send(request, stream=True)
        if asked.stream:
            return StreamingResponse(pieces(answer), answer.status_code, media_type="text/event-stream")
        await answer.aread()
        return JSONResponse(Answer.model_validate(answer.json()).model_dump(), answer.status_code)

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])


@contextmanager
def process(*command: str) -> Iterator[str]:
    """Start a Python process that says ``at http://...`` when it listens; yield its address, and end it afterwards."""
    started = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    drain = None
    try:
        said = ""
        for line in started.stderr:
            said += line
            if found := re.search(r"at (http://\S+?)(?:/v1|\s|$)", line):
                drain = threading.Thread(target=started.stderr.read, daemon=True)
                drain.start()
                yield found[1]
                return
        raise EngineError(f"{command[-1]!r} did not start: {said.strip()[-300:]}")
    finally:
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        if drain is not None:
            drain.join()
        started.stderr.close()


@dataclass
class Visits:
    """What visitors saw: seconds of each whole answer, and how many were lost."""

    seconds: list[float] = field(default_factory=list)
    lost: int = 0
    took: float = 0.0


async def visit(
    address: str, body: Callable[[int], dict[str, Any]], clients: int, turns: int, path: str = "/v1/completions"
) -> Visits:
    """Let ``clients`` at once each ask ``turns`` times over a kept connection; ``body`` is given the turn's number."""
    found, place = Visits(), urlparse(address)

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            for turn in range(turns):
                content = json.dumps(body(number * turns + turn)).encode()
                head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {len(content)}\r\n\r\n"
                started = time.perf_counter()
                writer.write(head.encode() + content)
                if await _answered(reader):
                    found.seconds.append(time.perf_counter() - started)
                else:
                    found.lost += 1
        finally:
            writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(clients)))
    found.took = time.perf_counter() - began
    return found


async def _answered(reader: asyncio.StreamReader) -> bool:
    """Read one answer to its end; return whether it was a whole one."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"content-length: " in head:
        await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r")[0]))
        return b" 200 " in head[:16]
    last = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        last = (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    whole = last.endswith(b"[DONE]\n\n") if b"text/event-stream" in head else last.endswith(b"}")
    return b" 200 " in head[:16] and whole


def main() -> None:
    """Stand before the server named on the command line until interrupted."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        print(f"at http://127.0.0.1:{listener.getsockname()[1]}/v1", file=sys.stderr, flush=True)
        config = uvicorn.Config(conventional(sys.argv[1]), log_level="warning", access_log=False, lifespan="off")
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
