"""What the coordinator's gate does about messages that a cut line swallowed, before a stand-in for the SuperLink."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the federation extra is not installed")

from mycel.federation.keyring import Keyring
from mycel.guard.gates import (
    ACTIVATE,
    DEACTIVATE,
    POLL,
    PUSH,
    REPEATS,
    CoordinatorGate,
    client_context,
    server_context,
)
from mycel.guard.handed import CONFIRM
from mycel.guard.keys import Identity, spki
from mycel.wire.relay import LOOK, Relay

Answers = Callable[[str, bytes], tuple[int, bytes]]


@dataclass
class Asker:
    """A party: one connection for each request."""

    port: int
    context: ssl.SSLContext
    key: str
    numbers: Iterator[int] = field(default_factory=count)

    async def opened(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context)

    async def __call__(self, path: str, body: bytes = b"x", stays: bool = True) -> tuple[int, bytes]:
        reader, writer = await self.opened()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        writer.write(
            f"{head}flwr-public-key: {self.key}\r\nflwr-signature: {next(self.numbers)}\r\n\r\n".encode() + body
        )
        await writer.drain()
        if not stays:
            writer.transport.abort()
            return 0, b""
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.partition(b"content-length: ")[2].split(b"\r\n")[0])
        found = int(answer.split()[1]), await reader.readexactly(length)
        writer.transport.abort()
        return found


@asynccontextmanager
async def gate(folder: Path, answers: Answers, pause: float = 0.0) -> AsyncIterator[tuple[Asker, Relay]]:
    """Yield a party that the gate knows, and the gate; what stands behind it takes ``pause`` seconds to answer."""
    keys = folder / "keys"
    ring = Keyring.make(keys, ["127.0.0.1"], ["clinic"])
    key = Identity.load(keys / "parties" / "clinic.pem").key
    context = client_context(keys / "authority.crt", keys / "parties" / "clinic.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                status, body = answers(head.split()[1].decode(), await reader.readexactly(length))
                await asyncio.sleep(pause)
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    behind = await asyncio.start_server(serve, "127.0.0.1", 0)
    policy = CoordinatorGate(ring.parties, lambda: {"clinic": 2**63 + 5})
    server = server_context(keys / "coordinator.pem", keys / "authority.crt")
    relay = Relay(("127.0.0.1", behind.sockets[0].getsockname()[1]), policy, server)
    before = await relay.start("127.0.0.1", 0)
    known = base64.b64encode(spki(key.public_key())).decode()
    try:
        yield Asker(before.sockets[0].getsockname()[1], context, known), relay
    finally:
        before.close()
        await relay.close()
        behind.close()


def test_a_message_is_delivered_until_it_is_confirmed_and_no_oftener_than_that(tmp_path: Path) -> None:
    waiting = [b"first", b"second", b"third"]

    async def program() -> None:
        async with gate(tmp_path, lambda path, _: (200, waiting.pop(0) if path == POLL else b"")) as (ask, _):
            assert [await ask(POLL) for _ in range(3)] == [(200, b"first")] * 3
            await ask(CONFIRM)
            assert [await ask(POLL) for _ in range(1 + REPEATS)] == [(200, b"second")] * (1 + REPEATS)
            assert await ask(POLL) == (200, b"third")  # one that nobody ever confirms is let go

    asyncio.run(program())


def test_a_message_is_delivered_again_to_the_node_that_it_was_for_and_outlives_refusals(tmp_path: Path) -> None:
    waiting = [b"first", b"second"]

    def answers(path: str, body: bytes) -> tuple[int, bytes]:
        return (401, b"not its number") if body == b"another's" else (200, waiting.pop(0) if path == POLL else b"")

    async def program() -> None:
        async with gate(tmp_path, answers) as (ask, _):
            assert await ask(POLL) == (200, b"first")
            assert await ask(POLL, b"another's") == (401, b"not its number")
            assert await ask(POLL) == (200, b"first")
            await ask(CONFIRM)
            assert await ask(POLL) == (200, b"second")

    asyncio.run(program())


def test_a_message_that_was_on_its_way_as_its_party_hung_up_is_kept_for_it(tmp_path: Path) -> None:
    waiting = [b"first", b"second"]

    async def program() -> None:
        slow = 1.6 * LOOK  # long enough to be seen to have gone
        async with gate(tmp_path, lambda path, _: (200, waiting.pop(0) if path == POLL else b""), slow) as (ask, relay):
            await ask(POLL, stays=False)
            while len(waiting) > 1 or relay.callers:
                await asyncio.sleep(0.01)
            assert await ask(POLL) == (200, b"first")

    asyncio.run(program())


def test_a_party_that_asks_again_before_its_cut_poll_is_answered_gets_the_message(tmp_path: Path) -> None:
    waiting = [b"first", b""]

    async def program() -> None:
        slow = 1.6 * LOOK
        async with gate(tmp_path, lambda path, _: (200, waiting.pop(0) if waiting else b""), slow) as (ask, _):
            await ask(POLL, stays=False)
            while len(waiting) > 1:
                await asyncio.sleep(0.01)
            assert await asyncio.wait_for(ask(POLL), 10) == (200, b"first")

    asyncio.run(program())


def test_nothing_is_fetched_for_a_party_that_has_hung_up(tmp_path: Path) -> None:
    bring = [False]
    fetched: list[str] = []

    def answers(path: str, _: bytes) -> tuple[int, bytes]:
        fetched.append(path)
        return 200, b"message" if bring[0] else b""

    async def program() -> None:
        async with gate(tmp_path, answers) as (ask, relay):
            await ask(POLL, stays=False)
            while not fetched:
                await asyncio.sleep(0.01)
            while relay.callers:
                await asyncio.sleep(0.01)
            before, bring[0] = len(fetched), True
            assert await ask(POLL) == (200, b"message")
            assert len(fetched) == before + 1

    asyncio.run(program())


def test_a_part_that_was_stored_is_said_to_be_stored_when_it_comes_again(tmp_path: Path) -> None:
    seen: set[bytes] = set()

    def answers(path: str, body: bytes) -> tuple[int, bytes]:
        fresh = body not in seen and body != b"unexpected"
        seen.add(body)
        return 200, b"\x08\x01" if path == PUSH and fresh else b""

    async def program() -> None:
        async with gate(tmp_path, answers) as (ask, _):
            assert [await ask(PUSH, b"part one") for _ in range(2)] == [(200, b"\x08\x01")] * 2
            assert await ask(PUSH, b"part two") == (200, b"\x08\x01")
            assert [await ask(PUSH, b"unexpected") for _ in range(2)] == [(200, b"")] * 2

    asyncio.run(program())


def test_a_party_that_comes_back_leaves_first_unless_it_is_still_here(tmp_path: Path) -> None:
    online = [True]
    asked: list[tuple[str, bytes]] = []

    def answers(path: str, body: bytes) -> tuple[int, bytes]:
        asked.append((path, body))
        refused = path == ACTIVATE and online[0]
        online[0] = path == ACTIVATE or (online[0] and path != DEACTIVATE)
        return (400, b"") if refused else (200, b"\x08\x01")

    async def program() -> None:
        async with gate(tmp_path, answers) as (ask, _):
            assert (await ask(ACTIVATE, b"key"))[0] == 200
            number = b"\x08\x85\x80\x80\x80\x80\x80\x80\x80\x80\x01"  # as Flower's own library writes it
            assert asked == [(ACTIVATE, b"key"), (DEACTIVATE, number), (ACTIVATE, b"key")]
            _, other = await ask.opened()
            await asyncio.sleep(0.1)  # until the gate knows of it
            assert (await ask(ACTIVATE, b"key"))[0] == 400
            other.close()

    asyncio.run(program())
