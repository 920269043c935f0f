"""The peer engine: members of a swarm announce themselves, watch each other, call each other, and stream.

``Peers`` is all that segments know of a network. What carries the frames is a subclass with three methods; all else is
the same on each. ``peers_memory`` is the public twin for tests and simulation, ``peers_zenoh`` the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from mycel.engines.identity import Announcement, Identity, verified
from mycel.errors import EngineError, MycelError

Answer = bytes | AsyncIterator[bytes]
Handler = Callable[[str, str, bytes], Awaitable[Answer]]
Kind = Literal["joined", "changed", "left"]

LARGEST_FRAME = 1 << 28  # bytes
MOST_TASKS = 4096  # calls that one member answers at a time
AHEAD = 8  # items of a stream that travel before the receiver has taken one
HEADER = struct.Struct("<B16sHH")
CALL, ANSWER, ITEM, END, REFUSAL, MORE, STOP = range(7)


class PeerLost(EngineError):
    """A member left, never was there, or did not answer in time; another may do."""


class PeerRefused(EngineError):
    """A member answered that it will not, with its sentence."""


@dataclass(frozen=True)
class Change:
    """Something that happened to a member of the swarm."""

    kind: Kind
    name: str
    facts: dict[str, Any]


@dataclass
class _Waiting:
    peer: str
    items: asyncio.Queue[tuple[int, bytes]] = field(default_factory=asyncio.Queue)

    def take(self, sender: str, kind: int, body: bytes) -> None:
        if sender == self.peer:  # what another sends under this number is no answer
            self.items.put_nowait((kind, body))


class Peers(ABC):
    """One member's view of its swarm.

    Attributes
    ----------
    name : str
        This member.
    bytes_sent, bytes_received : int
        Lengths of all frames, calls and answers alike.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity, self.name = identity, identity.name
        self.bytes_sent = self.bytes_received = 0
        self._loop = asyncio.get_running_loop()
        self._known: dict[str, tuple[Announcement, float]] = {}
        self._watchers: list[asyncio.Queue[Change | None]] = []
        self._waiting: dict[bytes, _Waiting] = {}
        self._tasks: dict[bytes, asyncio.Task[None]] = {}
        self._credit: dict[bytes, asyncio.Semaphore] = {}
        self._handler: Handler | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._expiry: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    @abstractmethod
    def _send(self, peer: str, frame: bytes) -> None:
        """Carry a frame to a member, in order; losses are allowed only when the member is gone."""

    @abstractmethod
    def _publish(self, announcement: bytes | None) -> None:
        """Make an announcement known to all members, those who come later too; None: withdraw it."""

    @abstractmethod
    async def _leave(self) -> None:
        """Let go of the network; every member learns that this one is gone."""

    def serve(self, handler: Handler) -> None:
        """Answer calls with ``handler(sender, verb, frame)``; it returns bytes or an iterator of items."""
        self._handler = handler

    async def announce(self, facts: dict[str, Any], lease: float = 15.0) -> None:
        """Say what this member offers; said again while it lives, and void ``lease`` seconds after it fell silent."""
        await self.withdraw(silently=True)

        async def renew() -> None:
            while True:
                await asyncio.sleep(lease / 3)
                self._publish(self.identity.sign(facts, lease))

        self._publish(self.identity.sign(facts, lease))
        self._renewal = asyncio.create_task(renew())

    async def withdraw(self, silently: bool = False) -> None:
        """Take the announcement back; calls are still answered."""
        if self._renewal is not None:
            self._renewal.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewal
            self._renewal = None
            if not silently:
                self._publish(None)

    def members(self) -> dict[str, dict[str, Any]]:
        """Return what the other members announce, by name."""
        return {name: found.facts for name, (found, _) in sorted(self._known.items())}

    async def watch(self) -> AsyncIterator[Change]:
        """Yield who is there, then every change, until this member closes."""
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        for name, facts in self.members().items():
            queue.put_nowait(Change("joined", name, facts))
        self._watchers.append(queue)
        try:
            while (change := await queue.get()) is not None:
                yield change
        finally:
            self._watchers.remove(queue)

    async def call(self, peer: str, verb: str, frame: bytes, within: float | None = None) -> bytes:
        """Ask a member and return its answer.

        Parameters
        ----------
        peer, verb : str
            Whom, and what for.
        frame : bytes
            At most 256 MiB.
        within : float, optional
            Seconds; without it, as long as the member is there.

        Raises
        ------
        PeerLost
            When the member is not there, leaves meanwhile, or does not answer in time.
        PeerRefused
            When it answers that it will not.
        """
        items = self.stream(peer, verb, frame)
        try:
            async with asyncio.timeout(within):
                async for item in items:
                    return item
        except TimeoutError as error:
            raise PeerLost(f"the peer {peer!r} gave no answer to {verb!r} within {within:.2f} s") from error
        finally:
            await items.aclose()
        raise PeerRefused(f"the peer {peer!r} answered {verb!r} with nothing")

    async def stream(self, peer: str, verb: str, frame: bytes) -> AsyncGenerator[bytes, None]:
        """Ask a member and yield what it answers, item by item; leaving the loop early stops it there."""
        if len(frame) > LARGEST_FRAME:
            raise EngineError(f"a frame of {len(frame):,} bytes is too long; at most {LARGEST_FRAME:,} travel")
        if self._closed or not self._present(peer):
            raise PeerLost(f"the peer {peer!r} is not there")
        number, over = os.urandom(16), False
        waiting = self._waiting[number] = _Waiting(peer)
        try:
            self._post(peer, CALL, number, verb, frame)
            while True:
                kind, body = await waiting.items.get()
                if kind in (ANSWER, ITEM):
                    over = kind == ANSWER
                    if kind == ITEM:
                        self._post(peer, MORE, number, "", b"")
                    yield body
                if kind not in (ANSWER, ITEM) or over:
                    over = True
                    break
            if kind == REFUSAL:
                raise PeerRefused(f"the peer {peer!r} refuses {verb!r}: {body.decode(errors='replace')[:500]}")
            if kind == STOP:
                raise PeerLost(f"the peer {peer!r} left before it answered {verb!r}")
        finally:
            del self._waiting[number]
            if not over and self._present(peer):
                self._post(peer, STOP, number, "", b"")

    async def close(self) -> None:
        """Leave the swarm; what others await of this member fails at once."""
        if self._closed:
            return
        self._closed = True
        await self.withdraw(silently=True)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for handle in self._expiry.values():
            handle.cancel()
        for waiting in self._waiting.values():
            waiting.items.put_nowait((STOP, b""))
        for queue in self._watchers:
            queue.put_nowait(None)
        await self._leave()

    def _present(self, peer: str) -> bool:
        return peer in self._known

    def _post(self, peer: str, kind: int, number: bytes, verb: str, body: bytes) -> None:
        sender, named = self.name.encode(), verb.encode()
        frame = b"".join((HEADER.pack(kind, number, len(sender), len(named)), sender, named, body))
        self.bytes_sent += len(frame)
        self._send(peer, frame)

    def _arrived(self, frame: bytes) -> None:
        """Take in a frame that the network brought; whatever is no frame of ours is dropped."""
        if self._closed or not HEADER.size <= len(frame) <= LARGEST_FRAME + 1024:
            return
        self.bytes_received += len(frame)
        kind, number, first, second = HEADER.unpack_from(frame)
        start = HEADER.size + first + second
        if start > len(frame):
            return
        sender = frame[HEADER.size : HEADER.size + first].decode(errors="replace")
        verb, body = frame[HEADER.size + first : start].decode(errors="replace"), frame[start:]
        if kind == CALL:
            self._begin(sender, verb, number, body)
        elif kind == MORE and number in self._credit:
            self._credit[number].release()
        elif kind == STOP and number in self._tasks:
            self._tasks[number].cancel()
        elif kind in (ANSWER, ITEM, END, REFUSAL) and number in self._waiting:
            self._waiting[number].take(sender, kind, body)

    def _begin(self, sender: str, verb: str, number: bytes, body: bytes) -> None:
        if len(self._tasks) >= MOST_TASKS or number in self._tasks:
            self._post(sender, REFUSAL, number, "", b"it has too much to do; ask later")
            return
        task = asyncio.create_task(self._work(sender, verb, number, body))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _work(self, sender: str, verb: str, number: bytes, body: bytes) -> None:
        try:
            if self._handler is None:
                raise EngineError("it answers no calls")
            answer = await self._handler(sender, verb, body)
            if isinstance(answer, bytes):
                self._post(sender, ANSWER, number, "", answer)
                return
            credit = self._credit[number] = asyncio.Semaphore(AHEAD)
            try:
                async for item in answer:
                    await credit.acquire()
                    self._post(sender, ITEM, number, "", item)
            finally:
                del self._credit[number]
                close = getattr(answer, "aclose", None)
                if close is not None:
                    await close()
            self._post(sender, END, number, "", b"")
        except MycelError as error:
            self._post(sender, REFUSAL, number, "", str(error).encode())
        except Exception as error:  # a fault here is this member's own; the other learns only that there was one
            self._post(sender, REFUSAL, number, "", f"a fault of its own, {type(error).__name__}".encode())

    def _heard(self, frame: bytes) -> None:
        """Take in an announcement; one that is forged, stale or older than what is known is dropped."""
        with contextlib.suppress(EngineError):
            said = verified(frame, self.identity.authority)
            known = self._known.get(said.name)
            if self._closed or said.name == self.name or (known and known[0].issued >= said.issued):
                return
            self._known[said.name] = (said, self._loop.time())
            if handle := self._expiry.pop(said.name, None):
                handle.cancel()
            self._expiry[said.name] = self._loop.call_later(said.lease, self._gone, said.name)
            if known is None or known[0].facts != said.facts:
                self._tell(Change("changed" if known else "joined", said.name, said.facts))

    def _gone(self, peer: str) -> None:
        """Take note that a member is no longer there: everything awaited of it fails now."""
        for waiting in self._waiting.values():
            if waiting.peer == peer:
                waiting.items.put_nowait((STOP, b""))
        if handle := self._expiry.pop(peer, None):
            handle.cancel()
        if (known := self._known.pop(peer, None)) is not None:
            self._tell(Change("left", peer, known[0].facts))

    def _tell(self, change: Change) -> None:
        for queue in self._watchers:
            queue.put_nowait(change)
