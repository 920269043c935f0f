"""The laws that every peer engine obeys, ours or a stranger's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from mycel.engines.calls import Answer, PeerLost, PeerRefused
from mycel.engines.peers import Change, Peers
from mycel.errors import EngineError
from mycel.testing.laws import law

PATIENCE = 20.0  # seconds after which something that must happen is missed
LONG = b"long" * (1 << 18)
Join = Callable[[str], Awaitable[Peers]]
SENTENCE = "this peer holds no such block"


async def check_peers(join: Join, stranger: Join | None = None) -> None:
    """Hold a peer engine to its contract; raise ``AssertionError`` with the law it breaks.

    Parameters
    ----------
    join : callable
        Returns a new member of one swarm, under the name it is given.
    stranger : callable, optional
        Returns one who holds no certificate of that swarm's authority.
    """
    laws: tuple[tuple[Callable[..., Awaitable[None]], int], ...] = (
        (_sees_members, 2), (_answers, 2), (_keeps_order, 2), (_hands_on, 3), (_fails, 2), (_streams, 2), (_loses, 2),
    )  # fmt: skip
    for each, count in laws:
        members = [await join(f"{each.__name__.strip('_').replace('_', '-')}-{index}") for index in range(count)]
        try:
            await asyncio.wait_for(each(*members), 3 * PATIENCE)
        finally:
            await asyncio.gather(*(member.close() for member in members))
    if stranger is not None:
        await _shuts_out(join, stranger)


async def until(true: Callable[[], bool], sentence: str) -> None:
    """Wait for something that must become true."""
    for _ in range(int(PATIENCE / 0.01)):
        if true():
            return
        await asyncio.sleep(0.01)
    law(False, sentence)


async def _echo(sender: str, verb: str, frame: bytes) -> Answer:
    if verb == "refuse":
        raise EngineError(SENTENCE)
    if verb == "crash":
        raise ZeroDivisionError("a secret of this machine")
    if verb == "wait":
        await asyncio.sleep(float(frame))
    return f"{sender} asks {verb}: ".encode() + frame


async def _meet(one: Peers, two: Peers) -> None:
    two.serve(_echo)
    await two.announce({"blocks": [0, 4]})
    await until(lambda: two.name in one.members(), "a member sees what another announces")


async def _sees_members(one: Peers, two: Peers) -> None:
    seen: list[Change] = []

    async def watch() -> None:
        seen.extend([change async for change in one.watch()])

    watching = asyncio.create_task(watch())
    await _meet(one, two)
    law(one.members()[two.name] == {"blocks": [0, 4]}, "an announcement's facts arrive as they were said")
    await two.announce({"blocks": [4, 8]})
    await until(lambda: one.members().get(two.name) == {"blocks": [4, 8]}, "a new announcement replaces the old")
    await one.announce({"blocks": "mine"})
    law(one.name not in one.members(), "a member is not among its own others")
    await two.withdraw()
    await until(lambda: two.name not in one.members(), "a withdrawn announcement is gone")
    await one.close()
    await asyncio.wait_for(watching, PATIENCE)
    kinds = [(change.kind, change.name) for change in seen]
    law(kinds == [(kind, two.name) for kind in ("joined", "changed", "left")], "a watcher learns of each change once")


async def _answers(one: Peers, two: Peers) -> None:
    await _meet(one, two)
    for frame in (b"", b"x", LONG):
        found = await one.call(two.name, "repeat", frame, PATIENCE)
        law(found == f"{one.name} asks repeat: ".encode() + frame, "an answer is what the handler made of the frame")
    many = await asyncio.gather(*(one.call(two.name, "repeat", b"%d" % n, PATIENCE) for n in range(64)))
    law([found.rpartition(b" ")[2] for found in many] == [b"%d" % n for n in range(64)], "answers meet their calls")


async def _keeps_order(one: Peers, two: Peers) -> None:
    came: list[int] = []

    async def note(sender: str, verb: str, frame: bytes) -> Answer:
        came.append(len(frame))
        return b""

    await _meet(one, two)
    two.serve(note)
    sizes = [len(LONG), 1, 2, len(LONG) // 2, 3]
    tickets = [one.ask(two.name, "note", LONG[:size]) for size in sizes]
    for ticket in tickets:
        await one.answer((ticket,), PATIENCE)
    law(came == sizes, "frames come in the order in which they were sent, however long they are")


async def _hands_on(one: Peers, two: Peers, three: Peers) -> None:
    async def pass_on(sender: str, verb: str, frame: bytes) -> Answer:
        law(two.hand_on(three.name, "repeat", b"news", sender, frame), "a member that is there can be asked")
        law(not two.hand_on("nobody", "repeat", b"", sender, frame), "a member that is not there cannot")
        return b"done"

    await _meet(two, three)
    await _meet(one, two)
    two.serve(pass_on)
    await until(lambda: three.name in one.members(), "a member sees all others")
    ticket = one.expect(three.name)
    law(await one.call(two.name, "pass", ticket.number, PATIENCE) == b"done", "whoever hands on answers too")
    found = await one.answer((ticket,), PATIENCE)
    law(found == f"{one.name} asks repeat: news".encode(), "what is handed on is answered to the first who asked")
    await _raised(PeerLost, one.answer((one.expect(three.name),), 0.05))


async def _fails(one: Peers, two: Peers) -> None:
    await _meet(one, two)
    found = await _raised(PeerRefused, one.call(two.name, "refuse", b"", PATIENCE))
    law(SENTENCE in found, "a refusal carries the member's sentence")
    found = await _raised(PeerRefused, one.call(two.name, "crash", b"", PATIENCE))
    law("secret" not in found, "what went wrong on another machine stays there")
    await _raised(PeerLost, one.call("nobody", "repeat", b"", PATIENCE))
    await _raised(PeerLost, one.call(two.name, "wait", b"30", 0.05))
    found = (await one.call(two.name, "repeat", b"on", PATIENCE)).decode()
    law(found.endswith("on"), "a member that was late once is still there")


async def _streams(one: Peers, two: Peers) -> None:
    stopped: list[int] = []

    async def count(frame: bytes) -> AsyncIterator[bytes]:
        place = 0
        try:
            while place < int(frame):
                yield b"%d" % place
                place += 1
        finally:
            stopped.append(place)

    async def serve(sender: str, verb: str, frame: bytes) -> Answer:
        return count(frame)

    await _meet(one, two)
    two.serve(serve)
    found = [int(item) async for item in one.stream(two.name, "count", b"50")]
    law(found == list(range(50)), "a stream's items come in order, all of them, and then it ends")
    items: Any = one.stream(two.name, "count", b"1000000")
    async for item in items:
        if int(item) == 20:
            break
    await items.aclose()
    await until(lambda: len(stopped) == 2, "a stream that nobody reads any more is stopped where it comes from")
    law(stopped[1] < 100, "a stream runs only a little ahead of its reader")


async def _loses(one: Peers, two: Peers) -> None:
    await _meet(one, two)
    waiting = asyncio.create_task(one.call(two.name, "wait", b"60"))
    await asyncio.sleep(0.05)
    await two.close()
    await asyncio.wait_for(_raised(PeerLost, waiting), PATIENCE)
    await until(lambda: two.name not in one.members(), "a member that left is no member")
    await _raised(PeerLost, one.call(two.name, "repeat", b"", PATIENCE))


async def _shuts_out(join: Join, stranger: Join) -> None:
    member, other = await join("shuts-out-0"), await stranger("shuts-out-1")
    try:
        member.serve(_echo)
        await member.announce({"blocks": [0, 4]})
        other.serve(_echo)
        await other.announce({"blocks": [0, 4]})
        await asyncio.sleep(0.5)
        law(not other.members(), "a stranger sees nobody")
        law(not member.members(), "nobody sees a stranger")
        await _raised(PeerLost, other.call(member.name, "repeat", b"", PATIENCE))
    finally:
        await asyncio.gather(member.close(), other.close())


async def _raised(kind: type[EngineError], waiting: Awaitable[bytes]) -> str:
    try:
        await waiting
    except kind as error:
        return str(error)
    law(False, f"{kind.__name__} is raised")
    raise AssertionError
