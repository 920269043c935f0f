"""Calls between members of a swarm: one answer or a stream of items to a frame, whatever carries the frames.

A call may be handed on: whoever is asked asks the next in the first one's name, and the answer goes to the first.
"""

from __future__ import annotations

import asyncio
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from mycel.engines.identity import NAME
from mycel.errors import EngineError, MycelError

Answer = bytes | AsyncIterator[bytes]
Handler = Callable[[str, str, bytes], Awaitable[Answer]]
AtOnce = Callable[[str, str, bytes], bytes | Awaitable[Answer] | None]

LARGEST_FRAME = 1 << 28  # bytes
MOST_TASKS = 4096  # calls that one member answers at a time
AHEAD = 8  # items of a stream that travel before the receiver has taken one
HEADER = struct.Struct("<B16sHH")
CALL, ANSWER, ITEM, END, REFUSAL, MORE, STOP = range(7)


class PeerLost(EngineError):
    """A member left, never was there, or did not answer in time; another may do."""


class PeerRefused(EngineError):
    """A member answered that it will not, with its sentence."""


class Ticket:
    """One answer that this member awaits.

    Attributes
    ----------
    peer : str
        Who is to give it.
    number : bytes
        16 bytes under which it comes.
    came : asyncio.Future
        Done when the answer, a refusal, or the news that the member left is there.
    """

    __slots__ = ("came", "number", "peer")

    def __init__(self, peer: str, came: asyncio.Future[tuple[int, bytes]]) -> None:
        self.peer, self.came, self.number = peer, came, os.urandom(16)

    def take(self, kind: int, body: bytes) -> None:
        """Keep the first thing that comes."""
        if not self.came.done():
            self.came.set_result((kind, body))


@dataclass
class _Waiting:
    peer: str
    items: asyncio.Queue[tuple[int, bytes]] = field(default_factory=asyncio.Queue)

    def take(self, kind: int, body: bytes) -> None:
        self.items.put_nowait((kind, body))


class Calls(ABC):
    """One member's calls and answers.

    Attributes
    ----------
    name : str
        This member.
    bytes_sent, bytes_received : int
        Lengths of all frames, calls and answers alike.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bytes_sent = self.bytes_received = 0
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[bytes, _Waiting | Ticket] = {}
        self._tasks: dict[bytes, asyncio.Task[None]] = {}
        self._credit: dict[bytes, asyncio.Semaphore] = {}
        self._handler: Handler | None = None
        self._at_once: AtOnce | None = None
        self._closed = False

    @abstractmethod
    def _send(self, peer: str, frame: bytes) -> None:
        """Carry a frame to a member, in order; losses are allowed only when the member is gone."""

    @abstractmethod
    def _present(self, peer: str) -> bool:
        """Return whether a member is there to be asked."""

    def serve(self, handler: Handler, at_once: AtOnce | None = None) -> None:
        """Answer calls with ``handler(sender, verb, frame)``; it returns bytes or an iterator of items.

        A call that comes alone, while no other is being answered, is first given to ``at_once``, which may answer it
        without the delay of a task of its own; None leaves it to ``handler``.
        """
        self._handler, self._at_once = handler, at_once

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
        return await self.answer((self.ask(peer, verb, frame),), within)

    def ask(self, peer: str, verb: str, frame: bytes) -> Ticket:
        """Ask a member; ``answer`` waits for what it says. Raises as ``call`` does when the member is not there."""
        self._check(peer, frame)
        ticket = self.expect(peer)
        self._post(peer, CALL, ticket.number, verb, frame)
        return ticket

    def expect(self, peer: str) -> Ticket:
        """Await an answer to what another member will ask ``peer`` in this one's name (``hand_on``)."""
        ticket = Ticket(peer, self._loop.create_future())
        self._waiting[ticket.number] = ticket
        if not self._present(peer):
            ticket.take(STOP, b"")
        return ticket

    def hand_on(self, peer: str, verb: str, frame: bytes, asker: str, number: bytes) -> bool:
        """Ask ``peer`` in the name of ``asker``, whom it answers; False when it is not there to be asked."""
        if self._closed or len(frame) > LARGEST_FRAME or not self._present(peer):
            return False
        self._post(peer, CALL, number, verb, frame, asker)
        return True

    async def answer(self, tickets: tuple[Ticket, ...], within: float | None = None, keep: bool = False) -> bytes:
        """Return what is answered first to any of these tickets of one member; they are void afterwards.

        Parameters
        ----------
        tickets : tuple of Ticket
            At least one.
        within : float, optional
            Seconds; without it, as long as the member is there.
        keep : bool
            Whether the tickets stay good when the time is over.
        """
        peer, over = tickets[0].peer, True
        try:
            done, _ = await asyncio.wait(
                [ticket.came for ticket in tickets], timeout=within, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                over = not keep
                raise PeerLost(f"the peer {peer!r} gave no answer within {within:.2f} s")
            kind, body = next(iter(done)).result()
        finally:
            if over:
                self.drop(tickets)
        if kind in (ANSWER, ITEM):
            return body
        if kind == REFUSAL:
            raise PeerRefused(f"the peer {peer!r} refuses: {body.decode(errors='replace')[:500]}")
        if kind == STOP:
            raise PeerLost(f"the peer {peer!r} is not there, or left before it answered")
        raise PeerRefused(f"the peer {peer!r} answered with nothing")

    def drop(self, tickets: Iterable[Ticket]) -> None:
        """Await these answers no longer; whoever still works for one stops."""
        for ticket in tickets:
            waited = self._waiting.pop(ticket.number, None)
            over = ticket.came.done() and ticket.came.result()[0] != ITEM
            if waited is not None and not over and self._present(ticket.peer):
                self._post(ticket.peer, STOP, ticket.number, "", b"")

    async def stream(self, peer: str, verb: str, frame: bytes) -> AsyncGenerator[bytes, None]:
        """Ask a member and yield what it answers, item by item; leaving the loop early stops it there."""
        self._check(peer, frame)
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

    def _check(self, peer: str, frame: bytes) -> None:
        if len(frame) > LARGEST_FRAME:
            raise EngineError(f"a frame of {len(frame):,} bytes is too long; at most {LARGEST_FRAME:,} travel")
        if self._closed or not self._present(peer):
            raise PeerLost(f"the peer {peer!r} is not there")

    def _post(self, peer: str, kind: int, number: bytes, verb: str, body: bytes, asker: str = "") -> None:
        sender, named = (asker or self.name).encode(), verb.encode()
        frame = b"".join((HEADER.pack(kind, number, len(sender), len(named)), sender, named, body))
        self.bytes_sent += len(frame)
        self._send(peer, frame)

    def _arrived(self, frame: bytes, alone: bool = False) -> None:
        """Take in a frame, ``alone`` if none waits behind it; whatever is no frame of ours is dropped."""
        if self._closed or not HEADER.size <= len(frame) <= LARGEST_FRAME + 1024:
            return
        self.bytes_received += len(frame)
        kind, number, first, second = HEADER.unpack_from(frame)
        start = HEADER.size + first + second
        if start > len(frame):
            return
        sender = frame[HEADER.size : HEADER.size + first].decode(errors="replace")
        verb, body = frame[HEADER.size + first : start].decode(errors="replace"), frame[start:]
        if kind == CALL and NAME.fullmatch(sender):  # what is no name may be an address of many
            self._begin(sender, verb, number, body, alone)
        elif kind == MORE and number in self._credit:
            self._credit[number].release()
        elif kind == STOP and number in self._tasks:
            self._tasks[number].cancel()
        elif kind in (ANSWER, ITEM, END, REFUSAL) and number in self._waiting:
            waiting = self._waiting[number]
            if sender == waiting.peer:  # what another sends under this number is no answer
                waiting.take(kind, body)

    def _begin(self, sender: str, verb: str, number: bytes, body: bytes, alone: bool) -> None:
        if len(self._tasks) >= MOST_TASKS or number in self._tasks:
            self._post(sender, REFUSAL, number, "", b"it has too much to do; ask later")
            return
        found: bytes | Awaitable[Answer] | None = None
        if alone and not self._tasks and self._at_once is not None:
            try:
                found = self._at_once(sender, verb, body)
            except Exception as error:  # as in _work
                self._refuse(sender, number, error)
                return
        if isinstance(found, bytes):
            self._post(sender, ANSWER, number, "", found)
            return
        task = asyncio.create_task(self._work(sender, verb, number, body, found))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _work(self, sender: str, verb: str, number: bytes, body: bytes, begun: Awaitable[Answer] | None) -> None:
        try:
            if self._handler is None:
                raise EngineError("it answers no calls")
            answer = await (self._handler(sender, verb, body) if begun is None else begun)
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
        except Exception as error:  # whatever went wrong, the other is told
            self._refuse(sender, number, error)

    def _refuse(self, sender: str, number: bytes, error: Exception) -> None:
        """Say why not; of a fault of this member's own the other learns only that there was one."""
        said = str(error) if isinstance(error, MycelError) else f"a fault of its own, {type(error).__name__}"
        self._post(sender, REFUSAL, number, "", said.encode())

    def _unanswered(self, peer: str) -> None:
        """Let everything awaited of a member fail, or of all members."""
        for waiting in self._waiting.values():
            if peer in ("", waiting.peer):
                waiting.take(STOP, b"")
