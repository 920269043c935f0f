"""The engine on a thread of its own, for callers on an event loop: each request is a stream of tokens."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mycel.errors import BusyError, GenerationError
from mycel.generation.engine import Engine
from mycel.generation.request import Request, Token

IDLE = 60.0  # seconds after which a thread without work looks up by itself


@dataclass
class Spans:
    """Moments of one request on the monotonic clock, in seconds: submitted, first token, last token."""

    submitted: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


class Service:
    """Serves an engine to an event loop.

    Parameters
    ----------
    engine : Engine
        Touched by the service's thread alone from here on.
    most : int
        Largest number of unfinished requests; more are refused as busy.
    """

    def __init__(self, engine: Engine, most: int = 256) -> None:
        self.engine, self.most = engine, most
        self.context, self.vocabulary = engine.context, engine.executor.vocabulary
        self.unfinished = 0
        self.rate = 0.0  # requests a second, lately
        self.failure = ""
        self._commands: deque[Callable[[], Any]] = deque()
        self._wake = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    async def stream(self, request: Request, spans: Spans | None = None) -> AsyncGenerator[Token]:
        """Yield a request's tokens as they come; leaving the iteration early cancels the request.

        Raises
        ------
        BusyError
            When as many requests as allowed are unfinished.
        GenerationError
            When the request is impossible, or the engine failed while it was under way.
        """
        self.engine.check(request)
        if self.unfinished >= self.most:
            raise BusyError(f"{self.unfinished} requests are under way", self.patience())
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Token] = asyncio.Queue()
        spans = spans or Spans()
        identity: list[int] = []

        def listener(token: Token) -> None:
            with suppress(RuntimeError):  # the loop may have closed while the last tokens came
                loop.call_soon_threadsafe(arrived.put_nowait, token)

        self.unfinished += 1
        submitted = self.call(lambda: identity.append(self.engine.submit(request, listener)))
        ended = False
        try:
            await submitted
            while not ended:
                token = await arrived.get()
                ended = token.reason is not None
                spans.last = time.monotonic()
                spans.first = spans.first or spans.last
                spans.tokens += token.id >= 0
                if token.reason == "error":
                    raise GenerationError(f"the engine failed and gave the request up: {self.failure}")
                yield token
        finally:
            self.unfinished -= 1
            self._pace(spans)
            if not ended:
                self._do(lambda: self.engine.cancel(identity[0] if identity else 0))

    def patience(self) -> int:
        """Return after how many whole seconds a refused caller may try again: when a place should be free."""
        return max(1, min(60, round(1 / self.rate))) if self.rate > 0 else 1

    async def call(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on the engine's thread, between two iterations, and return its result."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def command() -> None:
            try:
                found, error = action(), None
            except Exception as raised:  # handed to the caller, whatever it is
                found, error = None, raised
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, done, found, error)

        self._do(command)
        return await done

    def close(self) -> None:
        """Stop the thread and end what is under way."""
        self._stop = True
        self._wake.set()
        self._thread.join()
        self.engine.fail_all()
        self.engine.executor.close()

    def _do(self, command: Callable[[], Any]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _work(self) -> None:
        while not self._stop:
            self._wake.clear()
            while self._commands:
                self._commands.popleft()()
            try:
                busy = self.engine.step()
            except Exception as error:  # one bad iteration must not end the service
                self.failure = f"{type(error).__name__}: {error}"[:300]
                self.engine.fail_all()
                busy = False
            if not busy and not self._commands:
                self._wake.wait(IDLE)

    def _pace(self, spans: Spans) -> None:
        seconds = max(time.monotonic() - spans.submitted, 1e-3)
        self.rate = 0.9 * self.rate + 0.1 * (self.unfinished + 1) / seconds if self.rate else 1 / seconds


def _settle(done: asyncio.Future[Any], found: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(found)
