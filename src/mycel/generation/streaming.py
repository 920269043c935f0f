"""From a thread that generates to an event loop that reads: each request is a stream of tokens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

from mycel.errors import BusyError, GenerationError
from mycel.generation.request import Request, Spans, Token
from mycel.generation.sequence import Listener

APART = 1e-3  # seconds between two bursts of one stream at least, unless it ends
Notice = Callable[..., None]
"""Told that something happened: its kind, and facts by name."""


class Streamer:
    """What back ends on a thread of their own share: streams, a limit, and how long a refused caller should wait.

    Parameters
    ----------
    vocabulary, context : int
        Of the model.
    most : int
        Largest number of unfinished requests; more are refused as busy.
    """

    def __init__(self, vocabulary: int, context: int, most: int) -> None:
        self.vocabulary, self.context, self.most = vocabulary, context, most
        self.unfinished = 0
        self.rate = 0.0  # finished requests a second, lately
        self.failure = ""
        self._finished = time.monotonic()

    def check(self, request: Request) -> None:
        """Refuse a request that can never be answered."""
        request.check(self.vocabulary, self.context)

    def report_to(self, notice: Notice) -> None:
        """Tell ``notice`` from now on what happens beside the requests themselves."""

    async def begin(self, request: Request, listener: Listener, spans: Spans) -> Any:
        """Start a request; return what ``abandon`` takes."""
        raise NotImplementedError

    def abandon(self, started: Any) -> None:
        """Stop a request that nobody listens to any more."""
        raise NotImplementedError

    async def stream(self, request: Request, spans: Spans | None = None) -> AsyncGenerator[Token]:
        """Yield a request's tokens one by one, as ``bursts`` has them."""
        async with aclosing(self.bursts(request, spans)) as bursts:
            async for burst in bursts:
                for token in burst:
                    yield token

    async def bursts(self, request: Request, spans: Spans | None = None) -> AsyncGenerator[list[Token]]:
        """Yield a request's tokens, each time all that have come; leaving the iteration early cancels the request.

        Raises
        ------
        BusyError
            When as many requests as allowed are unfinished.
        GenerationError
            When the request is impossible, or the engine failed while it was under way.
        """
        self.check(request)
        if self.unfinished >= self.most:
            raise BusyError(f"{self.unfinished} requests are under way", self.patience())
        inbox = _Inbox(asyncio.get_running_loop())
        spans = spans or Spans()
        spans.submitted = time.monotonic()
        self.unfinished += 1
        # A task of its own: a caller that leaves while it starts must still be able to stop it.
        starting = asyncio.ensure_future(self.begin(request, inbox.put, spans))
        ended = False
        try:
            await asyncio.shield(starting)
            while not ended:
                burst = await inbox.take()
                ended = burst[-1].reason is not None
                failed = burst[-1].reason == "error"
                spans.last = time.monotonic()
                spans.first = spans.first or spans.last
                spans.tokens += sum(token.id >= 0 for token in burst)
                if burst := burst[:-1] if failed else burst:
                    yield burst
                if failed:
                    raise GenerationError(f"the engine failed and gave the request up: {self.failure}")
        finally:
            self.unfinished -= 1
            self._pace()
            if not ended:
                starting.add_done_callback(self._stop)

    def patience(self) -> int:
        """Return after how many whole seconds a refused caller may try again: when a place should be free."""
        return max(1, min(60, round(1 / self.rate))) if self.rate > 0 else 1

    def _stop(self, starting: asyncio.Future[Any]) -> None:
        if not starting.cancelled() and starting.exception() is None:
            self.abandon(starting.result())

    def _pace(self) -> None:
        now = time.monotonic()
        self.rate += 0.2 * (1 / max(now - self._finished, 1e-3) - self.rate)
        self._finished = now


class _Inbox:
    """Tokens from another thread; the loop is woken once for all that come before it looks.

    An engine that makes tokens faster than ``APART`` would have the loop write each for itself, at more cost than the
    token's own: then they are taken together, but for the last, which nobody waits for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._tokens, self._there = loop, deque[Token](), asyncio.Event()
        self._taken = 0.0

    def put(self, token: Token) -> None:
        """Add a token, from any one thread."""
        self._tokens.append(token)
        # Who takes goes on until nothing is left: a second token was seen by whoever the first one woke.
        if len(self._tokens) == 1 or token.reason is not None:
            with suppress(RuntimeError):  # the loop may have closed while the last tokens came
                self._loop.call_soon_threadsafe(self._there.set)

    async def take(self) -> list[Token]:
        """Return all that have come, at least one."""
        found: list[Token] = []
        while not found:
            await self._there.wait()
            self._there.clear()
            left = self._taken + APART - time.monotonic()
            if left > 0 and self._tokens and self._tokens[-1].reason is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._there.wait()
                self._there.clear()
            while self._tokens:
                found.append(self._tokens.popleft())
        self._taken = time.monotonic()
        return found
