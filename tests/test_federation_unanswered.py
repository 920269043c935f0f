"""First briefs that are lost on their way to everyone: no deadline is known yet, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the federation extra is not installed")

from flwr.app import Message

from large_rounds import coordinator_of
from mycel.engines.flower.apps import unpack
from mycel.engines.line import Control
from mycel.federation.unanswered import send_again
from mycel.rounds.coordinator import Coordinator
from mycel.testing.engines import Echo
from mycel.wire.algebra import group, with_role
from mycel.wire.parcel import Parcel
from mycel.wire.shelf import Shelf
from test_federation_engine import Parties, _parties

NUMBERS = 64


class Mirror(Echo):
    """Answers with the state that it was sent, once it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()
        self.worked = 0

    def describe(self, arm: str, job: str, node: int) -> Control:
        return {"samples": 1}

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        self.may.wait()
        self.worked += 1
        tensors = with_role("update", group(Parcel.from_bytes(frame).tensors, "shared"))
        return Parcel("answer", {"samples": 1}, tensors).to_bytes(), b""


def swallow(parties: Parties, count: int) -> None:
    """Lose the first briefs on their way, without a word."""
    assert parties.grid is not None
    left, deliver = [count], parties.grid._deliver

    def lossy(number: str, message: Message) -> None:
        if unpack(message.content)[0]["verb"] == "ask" and left[0]:
            left[0] -= 1
        else:
            deliver(number, message)

    parties.grid._deliver = lossy  # type: ignore[method-assign]


async def a_round(parties: Parties, lost: int, **seconds: float) -> Coordinator:
    engine = parties.engine()
    swallow(parties, lost)
    coordinator = coordinator_of(engine, NUMBERS, Shelf())
    watch: asyncio.Future[Any] = asyncio.ensure_future(send_again(coordinator, engine, **seconds))
    state = await coordinator.run()
    await watch  # it ends by itself once an answer has come
    await engine.close()
    assert all(bool((tensor == 2).all()) for tensor in state.shared.values())
    return coordinator


@pytest.mark.parametrize("lost", [2, 4])
def test_first_briefs_that_are_lost_are_sent_again_and_counted(lost: int) -> None:
    hosts = [Mirror() for _ in range(3)]
    with _parties(hosts) as parties:
        coordinator = asyncio.run(a_round(parties, lost, pause=0.05, on_its_way=0.2))
    assert coordinator.progress.drops == {"lost": lost}
    assert coordinator.progress.rounds[0]["answers"] == 2
    assert [host.worked for host in hosts] == [1, 1, 0]
    meter = coordinator.leases.meter  # once one has answered, a learnt deadline sees to the other
    assert meter.frames("down") == 2 + lost
    assert meter.frames("down", purpose="again") >= lost - 1


def test_a_party_that_is_at_work_is_asked_nothing_twice() -> None:
    hosts = [Mirror() for _ in range(3)]
    for host in hosts:
        host.may.clear()
    with _parties(hosts) as parties:
        for host in hosts:
            threading.Timer(1.0, host.may.set).start()
        coordinator = asyncio.run(a_round(parties, 0, pause=0.05, on_its_way=0.5))
    assert not coordinator.progress.drops
    assert coordinator.leases.meter.total("down", purpose="again") == 0
