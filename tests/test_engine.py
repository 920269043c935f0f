"""The embedded engine: the laws of every engine, whatever really does the work and however fast it is."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from mycel.engines.engine import Arrival, Request
from mycel.engines.inprocess import InProcessEngine, Labour
from mycel.engines.pool import ENDED, Inline, Reply, WorkerPool
from mycel.errors import EngineError
from mycel.fleet import Device, Fleet, load_fleet, run_virtual
from mycel.testing import check_engine
from mycel.testing.engines import Echo, request

UNEQUAL = load_fleet("unequal")


class Mortal(Echo):
    """A host whose process dies at the first visit of a file's path, at every visit of "die", and sleeps at "sleep"."""

    def handle(self, arm: str, node: int, frame: bytes, home: bytes) -> tuple[bytes, bytes]:
        if frame == b"die":
            os._exit(9)
        if frame == b"sleep":
            time.sleep(60)
        if frame.startswith(b"/") and not os.path.exists(frame):
            Path(os.fsdecode(frame)).touch()
            os._exit(9)
        return super().handle(arm, node, frame, home)


class Dawdling:
    """Does the work in threads after random real pauses."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._threads = ThreadPoolExecutor(4)

    def submit(self, arm: str, node: int, frame: bytes, home: bytes, due: float = 0.0) -> asyncio.Future[Reply]:
        pause = self._chance.random() * 0.02

        def work() -> Reply:
            time.sleep(pause)
            return Reply(*Echo().handle(arm, node, frame, home))

        return asyncio.get_running_loop().run_in_executor(self._threads, work)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool(Mortal, 2)
    workers.open("arm", "")
    yield workers
    workers.close()


def engine_over(labour: Labour, fleet: Fleet = UNEQUAL, seed: int = 1) -> InProcessEngine:
    return InProcessEngine(fleet, labour, "arm", seed)


def test_the_engine_obeys_the_laws_over_this_process() -> None:
    check_engine(lambda: engine_over(Inline(Echo)))


def test_the_engine_obeys_the_laws_over_worker_processes(pool: WorkerPool) -> None:
    check_engine(lambda: engine_over(pool))


class Homeless(InProcessEngine):
    """Forgets what parties keep."""

    def ask(self, request: Request, home: bytes | None = None) -> None:
        super().ask(request, b"")


class Mixing(InProcessEngine):
    """Hands answers over under another node's name."""

    async def answer(self, until: float | None) -> Arrival | None:
        arrival = await super().answer(until)
        return arrival and replace(arrival, node=(arrival.node + 1) % 3)


class Early(InProcessEngine):
    """Gives up waiting at once."""

    async def answer(self, until: float | None) -> Arrival | None:
        return None if until and until < self.now() + 1 else await super().answer(until)


class Backward(InProcessEngine):
    """Says that answers arrive before they were computed."""

    async def answer(self, until: float | None) -> Arrival | None:
        arrival = await super().answer(until)
        return arrival and replace(arrival, at=arrival.started / 2)


class Silent(InProcessEngine):
    """Turns faults into refusals."""

    async def answer(self, until: float | None) -> Arrival | None:
        try:
            return await super().answer(until)
        except EngineError as error:
            return Arrival(0, 1, b"", str(error), 0.0, 0.0, 0.0, self.now())


class Lossy(InProcessEngine):
    """Loses what it is asked."""

    def ask(self, request: Request, home: bytes | None = None) -> None:
        if request.node:
            super().ask(request, home)


class Drifting(InProcessEngine):
    """Takes a little longer each time."""

    longer = 0.0

    def ask(self, request: Request, home: bytes | None = None) -> None:
        Drifting.longer += 0.1
        super().ask(replace(request, seconds=request.seconds + Drifting.longer), home)


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (Homeless, "is kept at home"),
        (Mixing, "names the node"),
        (Early, "clock has come there"),
        (Backward, "in this order"),
        (Silent, "is raised"),
        (Lossy, "every request is answered"),
        (Drifting, "after the same time"),
    ],
)
def test_the_suite_refuses_broken_engines(kind: Callable[..., InProcessEngine], law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_engine(lambda: kind(UNEQUAL, Inline(Echo), "arm", 1))


def converse(labour: Labour, count: int = 40) -> list[tuple[int, int, float, bytes]]:
    """Ask four unequal nodes; whoever answers is asked again at once, with a brief of another length."""
    seen: list[tuple[int, int, float, bytes]] = []

    async def program() -> None:
        engine, generation = engine_over(labour), 0
        chance = random.Random(5)
        nodes = [0, 1, 2, 3]
        while len(seen) < count:
            for node in nodes:
                generation += 1
                engine.ask(request(engine, node, generation, b"x" * chance.randrange(5000), chance.random()))
            arrival = await engine.answer(None)
            assert arrival is not None
            seen.append((arrival.node, arrival.generation, engine.now(), bytes(arrival.frame)))
            nodes = [arrival.node]
        await engine.close()

    run_virtual(program())
    return seen


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_real_speed_of_the_work_changes_nothing(seed: int) -> None:
    assert converse(Dawdling(seed)) == converse(Inline(Echo))


def test_worker_processes_change_nothing(pool: WorkerPool) -> None:
    assert converse(pool) == converse(Inline(Echo))


def test_simultaneous_answers_come_in_the_order_of_their_nodes() -> None:
    async def program() -> list[int]:
        engine = engine_over(Inline(Echo), load_fleet("equal"))
        for generation, node in enumerate((3, 1, 2, 0), 1):
            engine.ask(request(engine, node, generation, b"same"))
        found = [await engine.answer(None) for _ in range(4)]
        return [arrival.node for arrival in found if arrival]

    assert run_virtual(program()) == [0, 1, 2, 3]


def test_an_unreliable_device_is_silent_about_as_often_as_it_says() -> None:
    fleet = Fleet("half", (Device("half", reliability=0.5),))

    async def program(seed: int) -> list[int]:
        engine = engine_over(Inline(Echo), fleet, seed)
        heard = []
        for generation in range(400):
            engine.ask(request(engine, 0, generation, b"hello"))
            arrival = await engine.answer(engine.now() + 60)
            heard += [arrival.generation] if arrival else []
            assert not engine.pending()
        return heard

    first, again, other = (run_virtual(program(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert 160 < len(first) < 240  # four standard deviations


def test_a_worker_that_dies_is_replaced_and_its_work_done_again(pool: WorkerPool, tmp_path: Path) -> None:
    marker = os.fsencode(tmp_path / "died")

    async def program() -> list[bytes]:
        engine = engine_over(pool)
        for node, frame in enumerate((b"one", marker, b"two")):
            engine.ask(request(engine, node, node + 1, frame))
        found = [await engine.answer(None) for _ in range(3)]
        return sorted(bytes(arrival.frame) for arrival in found if arrival)

    assert run_virtual(program()) == [b"0:1:one", b"1:1:" + marker, b"2:1:two"]
    assert Path(os.fsdecode(marker)).exists()


def test_work_that_kills_every_worker_is_an_error_that_says_so(pool: WorkerPool) -> None:
    async def program() -> None:
        engine = engine_over(pool)
        engine.ask(request(engine, 2, 1, b"die"))
        try:
            await engine.answer(None)
        finally:
            await engine.close()

    with pytest.raises(EngineError, match=r"died twice at node 2's work.*engine\.workers=1"):
        run_virtual(program())
    assert converse(pool, 4) == converse(Inline(Echo), 4)  # the pool has recovered


@pytest.mark.parametrize("inline", [True, False])
def test_a_fault_in_the_work_shows_where_it_happened(pool: WorkerPool, inline: bool) -> None:
    async def program() -> None:
        engine = engine_over(Inline(Echo) if inline else pool)
        engine.ask(request(engine, 1, 1, b"crash"))
        try:
            await engine.answer(None)
        finally:
            await engine.close()

    with pytest.raises(EngineError, match=r"(?s)work of node 1 failed.*in handle.*ZeroDivisionError"):
        run_virtual(program())


def test_closing_a_pool_ends_work_that_is_going_on_and_work_that_waits() -> None:
    workers = WorkerPool(Mortal, 1)
    workers.open("arm", "")

    async def program() -> list[Reply | BaseException]:
        work = [workers.submit("arm", node, b"sleep", b"") for node in range(3)]
        asyncio.get_running_loop().call_later(0.3, workers.close)
        return await asyncio.gather(*work, return_exceptions=True)

    failures = asyncio.run(program())
    assert [type(failure) for failure in failures] == [EngineError] * 3
    assert {str(failure) for failure in failures} == {ENDED}
    workers.close()


def test_the_engine_says_which_loop_it_needs() -> None:
    async def program() -> float:
        return engine_over(Inline(Echo)).now()

    with pytest.raises(AssertionError, match="run_virtual"):
        asyncio.run(program())
