"""A clock that is the event loop: ordinary asyncio whose time is simulated.

Sleeping costs nothing. When nothing can run, time jumps to the next timer - unless real work that is already due
has not really finished, in which case time stands still until it has. Programs written for this loop run unchanged
on an ordinary one, where the same sleeps take real seconds.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class _VirtualSelector(selectors.BaseSelector):
    """Polls the real selector; where a real one would sleep, it moves virtual time instead."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now = 0.0
        self.due = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = self._real.select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if timeout is None or self.due:
            return self._real.select(None)
        self.now = max(self.now + timeout, math.nextafter(self.now, math.inf))
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose ``time()`` is virtual seconds since ``start``."""

    def __init__(self, start: float = 0.0) -> None:
        self._virtual = _VirtualSelector()
        self._virtual.now = start
        super().__init__(self._virtual)

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual.now

    @property
    def _clock_resolution(self) -> float:
        # A timer fires when it lies less than this ahead. After some weeks of virtual time a nanosecond is lost in the
        # last digit of a float: a timer that is due would never fire, and the loop would turn for ever.
        return max(1e-9, math.ulp(self._virtual.now))

    @_clock_resolution.setter
    def _clock_resolution(self, seconds: float) -> None:
        """Take no notice: the loop sets it once, to the resolution of the real clock."""

    async def due(self, work: asyncio.Future[T]) -> T:
        """Wait for real work that is due now: virtual time stands still until it has finished."""
        self._virtual.due += 1
        try:
            return await work
        finally:
            self._virtual.due -= 1


async def until(moment: float) -> None:
    """Sleep until the loop's time reaches ``moment``; return at once if it has."""
    loop = asyncio.get_running_loop()
    if moment > loop.time():
        wake: asyncio.Future[None] = loop.create_future()
        handle = loop.call_at(moment, _wake, wake)
        try:
            await wake
        finally:
            handle.cancel()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def run_virtual(program: Coroutine[Any, Any, T], start: float = 0.0) -> T:
    """Run ``program`` to its end on a virtual clock that begins at ``start`` seconds."""
    results: list[T] = []

    async def kept_apart() -> None:
        # The runner formats its task, result and all, when it puts signal handlers back: a model takes long to print.
        results.append(await program)

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start)) as runner:
        runner.run(kept_apart())
    return results[0]
