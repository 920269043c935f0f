"""A relay for HTTP/1.1 between two ends that speak TLS: what passes, how long an answer may take, and what it cost.

A policy sees the head of each request before anything is read of its body, and may refuse it. A poll that has nothing
to bring is held back and asked again from here, so that a client which sleeps after each empty answer is served at
once. Bodies are never held whole, except small ones which the policy wants to look into.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h11

CHUNK = 1 << 18
LOOKED_INTO = 1 << 22  # bytes of a body that a policy looks into, at most
HELD = 15.0  # seconds that an empty answer is held back; Flower's clients give up after 30
SHARE, SOONEST, LATEST = 0.05, 0.05, 1.0  # a held poll is repeated after this share of its age, within these seconds
SENT, RECEIVED = 200, 128  # where the kernel's tcp_info keeps bytes sent and received


@dataclass(frozen=True)
class Head:
    """The head of one request."""

    method: str
    path: str
    headers: dict[str, str]
    length: int


@dataclass
class Caller:
    """Whoever opened a connection: who its certificate says it is, and what the kernel counted on its socket."""

    certificate: bytes
    socket: Any
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


class Policy:
    """Lets everything pass; others say what they change."""

    def refuse(self, caller: Caller, head: Head) -> str:
        """Return why a request may not pass, or nothing."""
        return ""

    def holds(self, head: Head) -> bool:
        """Return whether an empty answer to this request is held back until there is something to bring."""
        return False

    def inspects(self, head: Head) -> bool:
        """Return whether ``object_to`` wants to see the answer."""
        return False

    def object_to(self, head: Head, body: bytes) -> str:
        """Return why an answer may not pass, or nothing."""
        return ""

    def passed(self, caller: Caller, head: Head, answered: int) -> None:
        """Take note of a request that was answered with so many bytes."""


@dataclass
class Relay:
    """Listens at one place and passes requests on to another.

    Parameters
    ----------
    target : tuple of str and int
        Where requests go.
    server, client : SSLContext or None
        TLS towards callers, and towards the target; None for plain text.
    """

    target: tuple[str, int]
    policy: Policy = field(default_factory=Policy)
    server: ssl.SSLContext | None = None
    client: ssl.SSLContext | None = None
    refused: Counter[str] = field(default_factory=Counter)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self, host: str, port: int) -> asyncio.Server:
        """Begin to listen."""
        return await asyncio.start_server(self._serve, host, port, ssl=self.server, limit=CHUNK)

    async def close(self) -> None:
        """Cut every connection."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        tls = writer.get_extra_info("ssl_object")
        caller = Caller(tls.getpeercert(True) or b"" if tls else b"", writer.get_extra_info("socket"))
        exchange = Exchange(self, caller, reader, writer)
        try:
            while await exchange.one():
                pass
        except (OSError, EOFError, h11.ProtocolError, ssl.SSLError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            exchange.hang_up()


class Exchange:
    """One caller's connection, and the one that is opened for it to the target."""

    def __init__(
        self, relay: Relay, caller: Caller, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._relay, self._caller = relay, caller
        self._near = Side(h11.Connection(h11.SERVER, 1 << 14), reader, writer)
        self._far: Side | None = None

    async def one(self) -> bool:
        """Carry one request and its answer; return whether there may be another."""
        request = await self._near.event()
        if not isinstance(request, h11.Request):
            return False
        head = _head(request)
        why = "the request states no length" if head.length < 0 else self._relay.policy.refuse(self._caller, head)
        if why:
            self._relay.refused[why] += 1
            await self._near.answer(403 if head.length >= 0 else 411, why.encode())
            return False
        answered = await self._carry(request, head)
        self._relay.policy.passed(self._caller, head, answered)
        if self._near.connection.our_state is not h11.DONE or self._near.connection.their_state is not h11.DONE:
            return False
        self._near.connection.start_next_cycle()
        return True

    async def _carry(self, request: h11.Request, head: Head) -> int:
        policy = self._relay.policy
        if not policy.holds(head) and not policy.inspects(head):
            far = await self._open()
            await far.send(_towards(request))
            async for part in self._near.body():
                await far.send(h11.Data(part))
            await far.send(h11.EndOfMessage())
            return await self._pass_back(far)
        asked = await self._near.whole(LOOKED_INTO)
        began = asyncio.get_running_loop().time()
        while True:
            far = await self._open()
            await far.send(_towards(request))
            await far.send(h11.Data(asked))
            await far.send(h11.EndOfMessage())
            response = await far.response()
            body = await far.whole(LOOKED_INTO)
            far.connection.start_next_cycle()
            waited = asyncio.get_running_loop().time() - began
            if body or response.status_code != 200 or not policy.holds(head) or waited > HELD:
                break
            await asyncio.sleep(min(max(SHARE * waited, SOONEST), LATEST))
        why = policy.object_to(head, body) if policy.inspects(head) else ""
        if why:
            self._relay.refused[why] += 1
            await self._near.answer(502, why.encode())
            raise EOFError(why)
        await self._near.send(h11.Response(status_code=response.status_code, headers=response.headers))
        await self._near.send(h11.Data(body))
        await self._near.send(h11.EndOfMessage())
        return len(body)

    async def _pass_back(self, far: Side) -> int:
        response = await far.response()
        await self._near.send(h11.Response(status_code=response.status_code, headers=response.headers))
        count = 0
        async for part in far.body():
            count += len(part)
            await self._near.send(h11.Data(part))
        await self._near.send(h11.EndOfMessage())
        if far.connection.our_state is h11.DONE and far.connection.their_state is h11.DONE:
            far.connection.start_next_cycle()
        else:
            self._hang_up_far()
        return count

    async def _open(self) -> Side:
        if self._far is None or self._far.connection.our_state is not h11.IDLE or self._far.reader.at_eof():
            self._hang_up_far()
            self._far = Side(h11.Connection(h11.CLIENT), *await self._reach())
        return self._far

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the target; one that is away for a moment is waited for, as its callers would wait much longer."""
        (host, port), loop = self._relay.target, asyncio.get_running_loop()
        began = loop.time()
        while True:
            try:
                return await asyncio.open_connection(host, port, ssl=self._relay.client, limit=CHUNK)
            except ConnectionRefusedError:
                if loop.time() - began > HELD:
                    raise
                await asyncio.sleep(5 * SOONEST)

    def _hang_up_far(self) -> None:
        if self._far is not None:
            self._far.writer.close()
            self._far = None

    def hang_up(self) -> None:
        """Close both connections."""
        self._hang_up_far()
        with suppress(RuntimeError):
            self._near.writer.close()


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


def _head(request: h11.Request) -> Head:
    headers = {bytes(name).decode("latin-1"): bytes(value).decode("latin-1") for name, value in request.headers}
    length = headers.get("content-length", "")
    stated = length.isdecimal() and "transfer-encoding" not in headers
    path = request.target.decode("latin-1")
    return Head(request.method.decode("latin-1"), path, headers, int(length) if stated else -1)


def _towards(request: h11.Request) -> h11.Request:
    return h11.Request(method=request.method, target=request.target, headers=request.headers)
