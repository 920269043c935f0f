"""The engine on a thread of its own, for callers on an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mycel.generation.engine import Engine
from mycel.generation.request import Request, Spans
from mycel.generation.sequence import Listener
from mycel.generation.streaming import Notice, Streamer

EACH = 1.0  # seconds between two notices of how much is under way


class Service(Streamer):
    """Serves an engine to an event loop.

    Parameters
    ----------
    engine : Engine
        Touched by the service's thread alone from here on.
    most : int
        Largest number of unfinished requests; more are refused as busy.
    """

    def __init__(self, engine: Engine, most: int = 256) -> None:
        super().__init__(engine.executor.vocabulary, engine.context, most)
        self.engine = engine
        self._commands: deque[Callable[[], Any]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._notice: Notice | None = None
        self._told, self._told_at = (0, 0), 0.0
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def report_to(self, notice: Notice) -> None:
        """Tell ``notice`` once a second how much is under way, and of every failure."""
        self._notice = notice

    async def begin(self, request: Request, listener: Listener, spans: Spans) -> int:
        """Give a request to the engine; return its identity there."""
        identity: int = await self.call(lambda: self.engine.submit(request, listener, spans))
        return identity

    def abandon(self, started: int) -> None:
        """Cancel a request between two iterations."""
        self._do(lambda: self.engine.cancel(started))

    async def call(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on the engine's thread, between two iterations, and return its result."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def command() -> None:
            found, error = None, None
            try:
                found = action()
            except Exception as raised:  # handed to the caller, whatever it is
                error = raised
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, done, found, error)

        self._do(command)
        return await done

    def close(self) -> None:
        """Stop the thread and end what is under way."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self.engine.fail_all()
        self.engine.executor.close()

    def _do(self, command: Callable[[], Any]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _work(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                while self._commands:
                    self._commands.popleft()()
                busy = self.engine.step()
            except Exception as error:  # one bad iteration must not end the service
                self.failure = f"{type(error).__name__}: {error}"[:300]
                if self._notice is not None:
                    self._notice("failed", why=self.failure, requests=self.engine.waiting)
                self.engine.fail_all()
                busy = True
            self._tell(busy)
            if not busy:
                self._wake.wait()

    def _tell(self, busy: bool) -> None:
        state = (self.engine.waiting, self.engine.pool.held)
        now = time.monotonic()
        if self._notice is None or state == self._told or (busy and now < self._told_at + EACH):
            return
        self._told, self._told_at = state, now
        self._notice("state", requests=state[0], pages=state[1], of=self.engine.pool.count)


def _settle(done: asyncio.Future[Any], found: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(found)
