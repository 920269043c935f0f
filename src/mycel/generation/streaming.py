"""From a thread that generates to an event loop that reads: each request is a stream of tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from mycel.errors import BusyError, GenerationError
from mycel.generation.request import Request, Spans, Token
from mycel.generation.sequence import Listener

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
        """Yield a request's tokens as they come; leaving the iteration early cancels the request.

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
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Token] = asyncio.Queue()
        spans = spans or Spans()
        spans.submitted = time.monotonic()

        def listener(token: Token) -> None:
            with suppress(RuntimeError):  # the loop may have closed while the last tokens came
                loop.call_soon_threadsafe(arrived.put_nowait, token)

        self.unfinished += 1
        # A task of its own: a caller that leaves while it starts must still be able to stop it.
        starting = asyncio.ensure_future(self.begin(request, listener, spans))
        ended = False
        try:
            await asyncio.shield(starting)
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
