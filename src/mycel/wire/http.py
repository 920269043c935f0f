"""HTTP/1.1 as a relay speaks it: who calls, one end of a connection, the heads of requests, and whole answers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import h11

CHUNK = 1 << 18  # bytes that are read at once
SENT, RECEIVED = 200, 128  # where the kernel's tcp_info keeps bytes sent and received


@dataclass(frozen=True)
class Head:
    """The head of one request."""

    method: str
    path: str
    headers: dict[str, str]
    length: int


@dataclass(frozen=True)
class Reply:
    """A whole answer of the target."""

    status: int
    headers: Any
    body: bytes


@dataclass(eq=False)
class Caller:
    """Whoever opened a connection: who its certificate says it is, and what the kernel counted on its socket."""

    certificate: bytes
    socket: Any
    gone: Callable[[], bool]
    seen: tuple[int, int] = (0, 0)

    def traffic(self) -> tuple[int, int]:
        """Return the bytes received and sent since the last look, as the kernel counts them."""
        try:
            info = self.socket.getsockopt(6, 11, 232)  # IPPROTO_TCP, TCP_INFO
            now = struct.unpack_from("<Q", info, RECEIVED)[0], struct.unpack_from("<Q", info, SENT)[0]
        except (OSError, struct.error):
            return 0, 0
        before, self.seen = self.seen, now
        return now[0] - before[0], now[1] - before[1]


@dataclass
class Side:
    """One end of an exchange."""

    connection: h11.Connection
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def event(self) -> Any:
        """Return the next event; ``ConnectionClosed`` at the end."""
        while True:
            event = self.connection.next_event()
            if event is not h11.NEED_DATA:
                return event
            self.connection.receive_data(await self.reader.read(CHUNK))

    async def response(self) -> h11.Response:
        """Return the head of the answer."""
        while not isinstance(event := await self.event(), h11.Response):
            if isinstance(event, h11.ConnectionClosed):
                raise EOFError("the target hung up")
        return event

    async def body(self) -> AsyncIterator[bytes]:
        """Yield a body as it comes."""
        while not isinstance(event := await self.event(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise EOFError("the body was cut off")
            yield bytes(event.data)

    async def whole(self, most: int) -> bytes:
        """Return a small body."""
        parts = bytearray()
        async for part in self.body():
            parts += part
            if len(parts) > most:
                raise EOFError("the body is too long to be looked into")
        return bytes(parts)

    async def send(self, event: Any) -> None:
        """Write an event."""
        content = self.connection.send(event)
        if content:
            self.writer.write(content)
            await self.writer.drain()

    async def answer(self, status: int, text: bytes) -> None:
        """Write a whole answer of our own, after which the connection is closed."""
        headers = [("content-type", "text/plain"), ("content-length", str(len(text))), ("connection", "close")]
        await self.send(h11.Response(status_code=status, headers=headers))
        await self.send(h11.Data(text))
        await self.send(h11.EndOfMessage())


def head_of(request: h11.Request) -> Head:
    """Read a request's head; its length is -1 where it states none."""
    headers = {bytes(name).decode("latin-1"): bytes(value).decode("latin-1") for name, value in request.headers}
    length = headers.get("content-length", "")
    stated = length.isdecimal() and "transfer-encoding" not in headers
    path = request.target.decode("latin-1")
    return Head(request.method.decode("latin-1"), path, headers, int(length) if stated else -1)


def towards(request: h11.Request, path: str = "", length: int = 0) -> h11.Request:
    """Return a request as it is passed on; with a path, another one in the name of the same caller."""
    if not path:
        return h11.Request(method=request.method, target=request.target, headers=request.headers)
    headers = [(name, value) for name, value in request.headers if bytes(name) != b"content-length"]
    headers.append((b"content-length", str(length).encode()))
    return h11.Request(method=request.method, target=path, headers=headers)
