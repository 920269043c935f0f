"""A gate between real sockets with real TLS: what stands behind it is a stand-in, what calls it is by hand."""

from __future__ import annotations

import asyncio
import base64
import http.client
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from mycel.federation.keyring import Keyring
from mycel.guard.gates import CoordinatorGate, client_context, server_context
from mycel.guard.keys import Identity, spki
from mycel.wire.policy import Policy
from mycel.wire.relay import Relay

PUSH, POLL, APP = "/v1/fleet/push-object", "/v1/fleet/pull-messages", "/v1/fleet/get-fab"


class Target:
    """What stands behind a gate: it remembers what reached it, and answers a poll only once it has something."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, int]] = []
        self.empty_polls = 0
        self.app = b""
        self.message = b"answer"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b"":
            lines = head.decode().split("\r\n")
            length = int(next(line for line in lines if line.lower().startswith("content-length")).split(":")[1])
            left = length
            while left:
                if not (piece := await reader.read(min(left, 1 << 16))):
                    return
                left -= len(piece)
            path = lines[0].split()[1]
            self.reached.append((path, length))
            body = b"answer"
            if path == POLL:
                body = b"" if self.empty_polls else self.message
                self.empty_polls = max(self.empty_polls - 1, 0)
            if path == APP:
                body = self.app
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()


@asynccontextmanager
async def gate(policy: Policy, server: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Target, int, Relay]]:
    target = Target()
    behind = await asyncio.start_server(_quietly(target.serve), "127.0.0.1", 0)
    relay = Relay(("127.0.0.1", behind.sockets[0].getsockname()[1]), policy, server)
    before = await relay.start("127.0.0.1", 0)
    try:
        yield target, before.sockets[0].getsockname()[1], relay
    finally:
        before.close()
        await relay.close()
        behind.close()


Serving = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _quietly(serve: Serving) -> Serving:
    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    return guarded


def call(
    port: int,
    path: str,
    context: ssl.SSLContext | None,
    key: bytes = b"",
    signature: str = "one",
    body: bytes = b"x",
    timestamp: str = "",
) -> tuple[int, bytes]:
    connection = (
        http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
        if context
        else http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    )
    headers = {"flwr-public-key": base64.b64encode(key).decode(), "flwr-signature": signature}
    headers |= {"flwr-timestamp": timestamp} if timestamp else {}
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Town:
    """An authority, two parties that it admitted, and the coordinator's own certificate, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ring = Keyring.make(folder / "keys", ["127.0.0.1"], ["clinic", "institute"])
        self.identities = {name: Identity.load(self.file(name)) for name in ("clinic", "institute")}
        self.policy = CoordinatorGate(self.ring.parties)
        self.server = server_context(folder / "keys" / "coordinator.pem", folder / "keys" / "authority.crt")

    def file(self, name: str) -> Path:
        return self.folder / "keys" / "parties" / f"{name}.pem"

    def key(self, name: str) -> bytes:
        return spki(self.identities[name].key.public_key())

    def context(self, bundle: Path | None) -> ssl.SSLContext:
        return client_context(self.folder / "keys" / "authority.crt", bundle)
