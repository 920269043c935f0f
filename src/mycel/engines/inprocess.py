"""The embedded engine: real computation, virtual time.

Each request is a small asynchronous life: the brief travels, the work is done, the answer travels back. Values are
computed for real on whatever cores there are; durations come from the fleet's description, so the order in which
answers arrive never depends on the machine.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mycel.engines.engine import Arrival, Pending, Request
from mycel.engines.pool import Reply
from mycel.fleet.clock import VirtualLoop, until
from mycel.fleet.device import Fleet
from mycel.wire.shelf import Shelf

SETTLE = 1e-6  # virtual seconds within which answers count as simultaneous and are ordered by node


class Labour(Protocol):
    """Whatever really does the work: this process, or a pool of workers."""

    def submit(self, arm: str, node: int, frame: bytes, home: bytes, due: float = 0.0) -> asyncio.Future[Reply]:
        """Start the work, sooner what is ``due`` sooner on the virtual clock, and return a future of its reply."""


@dataclass
class InProcessEngine:
    """Simulates a fleet of parties for one arm of a run.

    Parameters
    ----------
    arm : str
        Which job of the labour the requests belong to.
    seed : int
        Decides which answers of unreliable devices vanish.
    kept : dict
        What parties keep at home.
    shelf : Shelf
        Where answers wait until the virtual clock lets them arrive.
    """

    fleet: Fleet
    labour: Labour
    arm: str
    seed: int
    kept: dict[int, bytes] = field(default_factory=dict)
    shelf: Shelf = field(default_factory=Shelf)
    _pending: dict[int, Pending] = field(default_factory=dict)
    _lives: set[asyncio.Task[None]] = field(default_factory=set)
    _arrived: list[tuple[float, int, int, Arrival, bytes]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _failure: BaseException | None = None

    def now(self) -> float:
        """Virtual seconds."""
        return _loop().time()

    def expected_seconds(self, request: Request) -> float | None:
        """Download and compute; the answer's size is not known beforehand, so the brief's stands in for it."""
        link, size = self.fleet[request.node].link, len(request.frame)
        return self._leaves(request) - request.asked + link.up_seconds(size)

    def _leaves(self, request: Request) -> float:
        """When the answer is done: after the brief's work, or for a node that works ahead before it."""
        started = request.asked + self.fleet[request.node].link.down_seconds(len(request.frame))
        return started + request.seconds if request.ready is None else max(started, request.ready)

    def ask(self, request: Request, home: bytes | None = None) -> None:
        """Begin the life of a request, unless the device is one whose answer will vanish."""
        luck = random.Random(f"{self.seed}/{request.node}/{request.generation}").random()
        if luck >= self.fleet[request.node].reliability:
            return
        start = self.kept.get(request.node, b"") if home is None else home
        self._pending[request.generation] = Pending(request, start)
        work = self.labour.submit(self.arm, request.node, bytes(request.frame), start, self._leaves(request))
        work.add_done_callback(_take_notice)
        life = _loop().create_task(self._live(request, work))
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)

    async def _live(self, request: Request, work: asyncio.Future[Reply]) -> None:
        link = self.fleet[request.node].link
        started = request.asked + link.down_seconds(len(request.frame))
        computed = self._leaves(request)
        await until(computed)
        try:
            reply = await _loop().due(work)
            at, home = computed + link.up_seconds(len(reply.frame)), reply.home
            arrival = Arrival(
                request.node,
                request.generation,
                self.shelf.keep(reply.frame),
                reply.refusal,
                request.asked,
                started,
                computed,
                at,
            )
            del work, reply  # or a thousand answers under way would stay in memory
            await until(at)
            heapq.heappush(self._arrived, (at, request.node, request.generation, arrival, home))
        except Exception as error:
            self._failure = error
        self._news.set()

    async def answer(self, until: float | None) -> Arrival | None:
        """Return the earliest answer; simultaneous ones come in the order of their nodes."""
        while not self._arrived:
            self._raise_failures()
            if not await self._wait(until):
                return None
        await asyncio.sleep(SETTLE)
        self._raise_failures()
        *_, arrival, home = heapq.heappop(self._arrived)
        self._pending.pop(arrival.generation, None)
        if home and not arrival.refusal:
            self.kept[arrival.node] = home
        return arrival

    async def _wait(self, deadline: float | None) -> bool:
        self._news.clear()
        seconds = None if deadline is None else max(deadline - self.now(), 0.0)
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return bool(self._arrived)
        return True

    def _raise_failures(self) -> None:
        if self._failure is not None:
            raise self._failure

    def homes(self) -> Mapping[int, bytes]:
        """What the simulated parties keep at home."""
        return self.kept

    def pending(self) -> Sequence[Pending]:
        """Requests on their way, answers that wait to be fetched included, in the order of asking."""
        return list(self._pending.values())

    async def close(self) -> None:
        """Cancel whatever is still out."""
        for life in list(self._lives):
            life.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)


def _take_notice(work: asyncio.Future[Reply]) -> None:
    """Look at a failure that nobody may wait for any more, or asyncio prints it when the engine was closed."""
    if not work.cancelled():
        work.exception()


def _loop() -> VirtualLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop), "the in-process engine runs on a virtual clock: use run_virtual"
    return loop
