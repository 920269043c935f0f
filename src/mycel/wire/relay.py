"""A relay for HTTP/1.1 between two ends that speak TLS: what passes, how long an answer may take, and what it cost.

A policy sees the head of each request before anything is read of its body, and may refuse it. A poll that has nothing
to bring is held back and asked again from here, so that a client which sleeps after each empty answer is served at
once; what it brings is kept until the policy knows that it arrived. Bodies are never held whole, except small ones
which the policy wants to look into. Nothing more is asked for a caller that has hung up.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import h11

from mycel.wire.http import CHUNK, Caller, Head, Reply, Side, head_of, towards
from mycel.wire.policy import Policy

SENTENCE = 500  # bytes of a refusal that are told
LOOKED_INTO = 1 << 22  # bytes of a body that a policy looks into, at most
HELD = 15.0  # seconds that an empty answer is held back; Flower's clients give up after 30
SHARE, SOONEST, LATEST = 0.05, 0.05, 1.0  # a held poll is repeated after this share of its age, within these seconds
LOOK = 0.5  # seconds between looks whether a caller that waits for an answer is still there


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
    callers: set[Caller] = field(default_factory=set)
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
        certificate = tls.getpeercert(True) or b"" if tls else b""
        caller = Caller(
            certificate, writer.get_extra_info("socket"), lambda: reader.at_eof() or writer.transport.is_closing()
        )
        self.callers.add(caller)
        exchange = Exchange(self, caller, reader, writer)
        try:
            while await exchange.one():
                pass
        except (OSError, EOFError, h11.ProtocolError, ssl.SSLError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.callers.discard(caller)
            exchange.hang_up()

    def alone(self, caller: Caller) -> bool:
        """Whether nobody else with a caller's certificate is connected."""
        same = (each for each in self.callers if each.certificate == caller.certificate)
        return all(each is caller or each.gone() for each in same)


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
        head = head_of(request)
        why = "the request states no length" if head.length < 0 else self._relay.policy.refuse(self._caller, head)
        if why:
            self._relay.refused[why] += 1
            await self._near.answer(403 if head.length >= 0 else 411, why.encode())
            return False
        door = self._relay.policy.door(head)
        if door is not None:
            await door(head.path, await self._near.whole(LOOKED_INTO), self._near)
            return False
        answered = await self._carry(request, head)
        self._relay.policy.passed(self._caller, head, answered)
        if self._near.connection.our_state is not h11.DONE or self._near.connection.their_state is not h11.DONE:
            return False
        self._near.connection.start_next_cycle()
        return True

    async def _carry(self, request: h11.Request, head: Head) -> int:
        policy = self._relay.policy
        if policy.examines(head):
            return await self._pass_back(await self._send(towards(request), await self._examined(head)))
        if not policy.holds(head) and not policy.inspects(head):
            far = await self._open()
            digest = hashlib.sha256(head.path.encode())
            await far.send(towards(request))
            async for part in self._near.body():
                digest.update(part)
                await far.send(h11.Data(part))
            await far.send(h11.EndOfMessage())
            if not policy.settles(head):
                return await self._pass_back(far)
            return await self._give(policy.settle(self._caller, digest.digest(), await self._whole(far)))
        asked = await self._near.whole(LOOKED_INTO)
        reply = policy.kept(self._caller, head, asked) or await self._insist(request, head, asked)
        await self._turn_away(502, policy.object_to(head, reply.body) if policy.inspects(head) else "")
        policy.answering(self._caller, head, asked, reply)
        return await self._give(reply)

    async def _examined(self, head: Head) -> bytes:
        """Return a request's whole body, if nothing is to be said against it."""
        body = await self._near.whole(LOOKED_INTO)
        await self._turn_away(403, self._relay.policy.object_to_request(self._caller, head, body))
        return body

    async def _turn_away(self, status: int, why: str) -> None:
        """Refuse and hang up, if there is a reason to."""
        if why:
            self._relay.refused[why] += 1
            await self._near.answer(status, why.encode())
            raise EOFError(why)

    async def _insist(self, request: h11.Request, head: Head, asked: bytes) -> Reply:
        """Ask the target: after what has to be asked first, and again while it has nothing to bring."""
        policy, caller = self._relay.policy, self._caller
        began, tried = asyncio.get_running_loop().time(), False
        while True:
            reply = await self._put(towards(request), asked)
            first = None if tried else policy.before(caller, head, reply.status, self._relay.alone(caller))
            if first is not None:
                tried, (path, body) = True, first
                await self._put(towards(request, path, len(body)), body)
                continue
            waited = asyncio.get_running_loop().time() - began
            if reply.body or reply.status != 200 or not policy.holds(head) or waited > HELD:
                return reply
            await asyncio.sleep(min(max(SHARE * waited, SOONEST), LATEST))
            if caller.gone():  # whatever came now would be lost
                raise EOFError("the caller hung up")
            kept = policy.kept(caller, head, asked)
            if kept is not None:  # given meanwhile to its poll before this one, whose line is cut
                return kept

    async def _put(self, request: h11.Request, body: bytes) -> Reply:
        return await self._whole(await self._send(request, body))

    async def _send(self, request: h11.Request, body: bytes) -> Side:
        far = await self._open()
        for event in (request, h11.Data(body), h11.EndOfMessage()):
            await far.send(event)
        return far

    async def _whole(self, far: Side) -> Reply:
        response = await far.response()  # also for one who has hung up: a message that was handed over is kept for it
        reply = Reply(response.status_code, response.headers, await far.whole(LOOKED_INTO))
        self._ready(far)
        return reply

    async def _give(self, reply: Reply) -> int:
        await self._near.send(h11.Response(status_code=reply.status, headers=reply.headers))
        await self._near.send(h11.Data(reply.body))
        await self._near.send(h11.EndOfMessage())
        return len(reply.body)

    async def _pass_back(self, far: Side) -> int:
        response = await self._response(far)
        await self._near.send(h11.Response(status_code=response.status_code, headers=response.headers))
        count, words = 0, b""
        async for part in far.body():
            count += len(part)
            words = words or part[:SENTENCE]
            await self._near.send(h11.Data(part))
        await self._near.send(h11.EndOfMessage())
        if response.status_code == 403:
            self._relay.policy.told(words.decode(errors="replace"))
        self._ready(far)
        return count

    async def _response(self, far: Side) -> h11.Response:
        """Wait for the head of an answer while there is somebody to give it to."""
        waiting = asyncio.ensure_future(far.response())
        try:
            while not (await asyncio.wait([waiting], timeout=LOOK))[0]:
                if self._caller.gone():
                    raise EOFError("the caller hung up")
            return waiting.result()
        finally:
            waiting.cancel()

    def _ready(self, far: Side) -> None:
        """Make the target's connection ready for another request, or close it."""
        if far.connection.our_state is h11.DONE and far.connection.their_state is h11.DONE:
            far.connection.start_next_cycle()
        else:
            self._hang_up_far()

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
