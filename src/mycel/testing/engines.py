"""The laws that every engine obeys, ours or a stranger's."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from mycel.engines.engine import Arrival, Engine, Request
from mycel.errors import EngineError, ParcelError
from mycel.fleet.clock import run_virtual
from mycel.testing.laws import law

NODES = (0, 1, 2)
REFUSAL = "this node does not answer such a brief"
FAULT = "the work divides by zero"
SHORT = 0.05  # seconds: what an engine on a real clock may be made to wait
PATIENCE = 60.0  # seconds after which a reliable node's answer is missed

Program = Callable[[Coroutine[Any, Any, None]], None]
Law = Callable[[Callable[[], Engine]], Coroutine[Any, Any, None]]


class Echo:
    """The host that a checked engine's nodes run: it repeats the brief, and counts its visits at home."""

    def open(self, arm: str, job: str) -> None:
        """Need nothing."""

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        """Return ``node:visits:frame``; refuse a frame that begins with "refuse", fail at one with "crash"."""
        if frame.startswith(b"refuse"):
            raise ParcelError(REFUSAL)
        if frame.startswith(b"crash"):
            raise ZeroDivisionError(FAULT)
        visits = int(home or b"0") + 1
        return b"%d:%d:%s" % (node, visits, frame), b"%d" % visits

    def close(self) -> None:
        """Nothing to give back."""


def check_engine(make_engine: Callable[[], Engine], run: Program = run_virtual) -> None:
    """Hold an engine to its contract; raise ``AssertionError`` with the law it breaks.

    Parameters
    ----------
    make_engine : callable
        Returns a fresh engine of at least three reliable nodes that run ``Echo`` and keep nothing at home yet.
        It is called inside the running loop.
    run : callable
        Runs a coroutine to its end on the engine's loop: ``asyncio.run`` for an engine on a real clock.
    """
    for each in (
        _answers_every_request,
        _keeps_silence,
        _refuses,
        _keeps_homes_apart,
        _reports_faults,
        _knows_what_is_pending,
        _repeats_itself,
    ):
        run(each(make_engine))


def request(engine: Engine, node: int, generation: int, frame: bytes, seconds: float = 0.01) -> Request:
    """Return a request that is sent now."""
    return Request(node, generation, frame, engine.now(), seconds)


async def _collect(engine: Engine, count: int) -> list[Arrival]:
    arrivals = []
    for _ in range(count):
        arrival = await engine.answer(engine.now() + PATIENCE)
        law(arrival is not None, "every request is answered")
        assert arrival is not None
        law(arrival.at <= engine.now(), "an answer is not handed over before it has arrived")
        arrivals.append(arrival)
    return arrivals


async def _answers_every_request(make_engine: Callable[[], Engine]) -> None:
    engine = make_engine()
    asked = {node + 1: request(engine, node, node + 1, b"brief %d" % node) for node in NODES}
    for item in asked.values():
        engine.ask(item)
    arrivals = await _collect(engine, len(NODES))
    law(
        {each.generation for each in arrivals} == set(asked),
        "there is one answer to each request, under its generation",
    )
    for each in arrivals:
        node, frame = asked[each.generation].node, asked[each.generation].frame
        law(each.node == node, "an answer names the node that was asked")
        law(bytes(each.frame) == b"%d:1:%s" % (node, frame), "an answer's bytes are what the work made")
        law(not each.refusal, "what was answered was not refused")
        ordered = each.asked <= each.started <= each.computed <= each.at
        law(each.asked == asked[each.generation].asked and ordered, "asked, started, computed and at are in this order")
    await engine.close()


async def _keeps_silence(make_engine: Callable[[], Engine]) -> None:
    engine = make_engine()
    until = engine.now() + SHORT
    law(await engine.answer(until) is None, "with nothing asked, answer(until) returns None")
    law(engine.now() >= until - 1e-6, "answer(until) returns None only when the clock has come there")
    engine.ask(request(engine, 0, 1, b"left alone"))
    await engine.close()


async def _refuses(make_engine: Callable[[], Engine]) -> None:
    engine = make_engine()
    for generation, (frame, visits) in enumerate(((b"one", 1), (b"refuse", 0), (b"two", 2)), 1):
        engine.ask(request(engine, 0, generation, frame))
        (arrival,) = await _collect(engine, 1)
        if visits:
            law(bytes(arrival.frame) == b"0:%d:%s" % (visits, frame), "a refusal leaves what is kept at home alone")
        else:
            law(REFUSAL in arrival.refusal and not arrival.frame, "a refusal carries its sentence and no bytes")
    await engine.close()


async def _keeps_homes_apart(make_engine: Callable[[], Engine]) -> None:
    engine = make_engine()
    generation = 0
    for visit in (1, 2, 3):
        for node in NODES:
            generation += 1
            engine.ask(request(engine, node, generation, b"visit %d" % visit))
        found = {each.node: bytes(each.frame) for each in await _collect(engine, len(NODES))}
        expected = {node: b"%d:%d:visit %d" % (node, visit, visit) for node in NODES}
        law(found == expected, "what one party keeps at home is there at its next work, and at no other party's")
    await engine.close()


async def _reports_faults(make_engine: Callable[[], Engine]) -> None:
    engine = make_engine()
    engine.ask(request(engine, 0, 1, b"crash"))
    own_masters = not engine.pending()
    try:
        arrival = await engine.answer(engine.now() + PATIENCE)
    except EngineError as error:
        law(not own_masters, "a fault at a party of its own ends no one else's run")
        law(FAULT in str(error), "a fault in the work is an EngineError that holds its trace")
    else:
        law(own_masters, "a fault in the work is raised, not handed over as an answer")
        law(arrival is not None and bool(arrival.refusal), "a fault at a party of its own is a refusal")
        law(
            arrival is not None and FAULT not in arrival.refusal,
            "a party's trace, which may show its data, stays there",
        )
    await engine.close()


async def _knows_what_is_pending(make_engine: Callable[[], Engine]) -> None:
    engine = make_engine()
    for node in NODES:
        engine.ask(request(engine, node, node + 1, b"brief"))
    if not engine.pending():  # parties of their own, which remember for themselves
        await _collect(engine, len(NODES))
        await engine.close()
        return
    out = {each.request.generation for each in engine.pending()}
    law(out == {node + 1 for node in NODES}, "every request without an answer is pending")
    for left in (2, 1, 0):
        (arrival,) = await _collect(engine, 1)
        out.discard(arrival.generation)
        found = {each.request.generation for each in engine.pending()}
        law(found == out and len(found) == left, "a request is pending until its answer is handed over")
    engine.ask(request(engine, 0, 9, b"again"), b"41")
    law([each.home for each in engine.pending()] == [b"41"], "what is pending keeps the home it began with")
    (arrival,) = await _collect(engine, 1)
    law(bytes(arrival.frame) == b"0:42:again", "a request asked again begins with the home that it is given")
    law(engine.homes()[0] == b"42", "homes() holds what a party keeps after its last answer")
    await engine.close()


async def _repeats_itself(make_engine: Callable[[], Engine]) -> None:
    seen = []
    for _ in range(2):
        engine = make_engine()
        for node in NODES:
            engine.ask(request(engine, node, node + 1, b"brief" * 10 ** (3 - node)))
        arrivals = await _collect(engine, len(NODES))
        expected = engine.expected_seconds(request(engine, 0, 1, b"brief"))
        law(expected is None or expected > 0, "expected seconds are a positive number, or None")
        moment = arrivals[0].asked
        seen.append([(each.node, bytes(each.frame), round(each.at - moment, 9)) for each in arrivals])
        await engine.close()
        if expected is None:  # a real clock, whose order is its own
            return
    law(seen[0] == seen[1], "the same requests are answered in the same order after the same time")
    ordered = [seconds for *_, seconds in seen[0]]
    law(ordered == sorted(ordered), "answers are handed over in the order of their arrival")
