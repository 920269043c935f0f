"""Answers that are sent in parts, and clients that go away or take nothing while one is made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PATIENCE = 60.0  # seconds in which a client takes nothing of what was sent, after which it is given up

Result = TypeVar("Result")


async def _nothing() -> None:
    pass


class Parts(Response):
    """A response in parts, sent as they come; when it is over, however it ended, what makes the parts is ended too.

    Parameters
    ----------
    parts : AsyncGenerator of bytes
        The body.
    status : int
        Of the answer.
    headers : mapping of str to str
        Sent before the first part.
    media_type : str, optional
        What the body is.
    release : callable, optional
        Awaited in the end, also when no part was ever asked for.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes],
        status: int,
        headers: Mapping[str, str],
        media_type: str | None = None,
        release: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        self.parts, self.status_code, self.media_type, self.release = parts, status, media_type, release
        self.background = None
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client goes away."""
        try:
            with suppress(ClientDisconnect):
                await unless_gone(receive, self._sent(send))
        finally:
            await self.parts.aclose()
            await self.release()

    async def _sent(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self.parts:
            try:
                async with asyncio.timeout(PATIENCE):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except TimeoutError as error:
                raise ClientDisconnect from error
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, action: Awaitable[Result]) -> Result:
    """Return what ``action`` returns, and cancel it when the client goes away.

    Raises
    ------
    ClientDisconnect
        When it has gone.
    """
    work = asyncio.ensure_future(action)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return await work
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
