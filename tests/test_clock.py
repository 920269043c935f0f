"""The virtual clock: sleeping costs nothing, order follows from durations, work that is due holds time."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.fleet import VirtualLoop, run_virtual
from mycel.fleet.clock import until

YEAR = 365 * 24 * 3600.0


def loop() -> VirtualLoop:
    found = asyncio.get_running_loop()
    assert isinstance(found, VirtualLoop)
    return found


def test_a_year_of_sleep_is_over_at_once() -> None:
    async def program() -> float:
        await asyncio.sleep(YEAR)
        return loop().time()

    assert run_virtual(program()) == pytest.approx(YEAR, abs=1e-6)


def test_time_begins_where_it_is_told_to() -> None:
    async def program() -> tuple[float, float]:
        before = loop().time()
        await asyncio.sleep(2)
        return before, loop().time()

    before, after = run_virtual(program(), 40.0)
    assert before == 40.0
    assert after == pytest.approx(42.0, abs=1e-8)


def test_the_smallest_step_moves_even_a_late_clock() -> None:
    async def program() -> float:
        for _ in range(3):
            await asyncio.sleep(1e-12)
        return loop().time()

    assert run_virtual(program(), 1e12) >= 1e12


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.001, 1e4), min_size=1, max_size=12, unique=True))
def test_sleepers_wake_in_the_order_of_their_moments(moments: list[float]) -> None:
    woken: list[tuple[float, float]] = []

    async def sleeper(moment: float) -> None:
        await until(moment)
        woken.append((moment, loop().time()))

    async def program() -> None:
        await asyncio.gather(*(sleeper(moment) for moment in moments))

    run_virtual(program())
    assert [moment for moment, _ in woken] == sorted(moments)
    for moment, found in woken:
        assert found == pytest.approx(moment, abs=1e-6)


def test_until_a_moment_that_has_passed_returns_without_a_pause() -> None:
    async def program() -> float:
        await asyncio.sleep(5)
        before = loop().time()
        await until(3.0)
        return loop().time() - before

    assert run_virtual(program()) == 0.0


def test_work_that_is_due_holds_time_until_it_has_finished() -> None:
    release = threading.Event()
    seen: list[tuple[str, float]] = []

    async def worker(pool: ThreadPoolExecutor) -> None:
        await until(1.0)
        # The timer at 1.5 may only fire once this has returned, however long the thread takes.
        await loop().due(loop().run_in_executor(pool, release.wait, 10))
        seen.append(("work", loop().time()))

    async def sleeper() -> None:
        await until(1.5)
        seen.append(("timer", loop().time()))

    async def program() -> None:
        with ThreadPoolExecutor(1) as pool:
            threading.Timer(0.05, release.set).start()
            await asyncio.gather(worker(pool), sleeper())

    run_virtual(program())
    assert [name for name, _ in seen] == ["work", "timer"]
    assert seen[0][1] == pytest.approx(1.0, abs=1e-8)


def test_work_that_is_not_due_yet_lets_time_run_ahead() -> None:
    release = threading.Event()

    async def program() -> bool:
        with ThreadPoolExecutor(1) as pool:
            work = loop().run_in_executor(pool, release.wait, 10)
            await asyncio.sleep(YEAR)  # were time to stand still, this would never be over
            release.set()
            return await loop().due(work)

    assert run_virtual(program()) is True


def test_failed_work_lets_time_go_on() -> None:
    def fail() -> None:
        raise LookupError("lost")

    async def program() -> float:
        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(LookupError):
                await loop().due(loop().run_in_executor(pool, fail))
            await asyncio.sleep(7)
        return loop().time()

    assert run_virtual(program()) == pytest.approx(7, abs=1e-6)


def test_a_timeout_is_virtual_too() -> None:
    async def program() -> float:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop().create_future(), YEAR)
        return loop().time()

    assert run_virtual(program()) == pytest.approx(YEAR, abs=1e-6)


def trace(seed: int, delay: float) -> list[tuple[int, float]]:
    """Twelve lives of random sleeps and real work in threads, which really take up to ``delay`` seconds."""
    seen: list[tuple[int, float]] = []

    async def life(number: int, pool: ThreadPoolExecutor) -> None:
        chance, pause = random.Random(f"{seed}/{number}"), threading.Event()
        for _ in range(4):
            await asyncio.sleep(chance.random())
            await loop().due(loop().run_in_executor(pool, pause.wait, random.random() * delay))
            seen.append((number, loop().time()))

    async def program() -> None:
        with ThreadPoolExecutor(4) as pool:
            await asyncio.gather(*(life(number, pool) for number in range(12)))

    run_virtual(program())
    return seen


def test_the_real_speed_of_work_does_not_show_in_virtual_time() -> None:
    slow, fast = trace(1, 0.01), trace(1, 0.0)
    assert len(fast) == 48
    assert sorted(slow) == sorted(fast)
    assert [moment for _, moment in slow] == sorted(moment for _, moment in fast)
