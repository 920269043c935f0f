"""What operators ask of a coordinator from elsewhere: how it stands, and the line to a run's ServerApp.

They come to the gate's own port, over the same TLS, with a certificate that admits them as operators.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mycel.errors import MycelError
from mycel.federation.begin import begin
from mycel.federation.place import overview, state_folder, write_status
from mycel.wire.http import CHUNK, Side

STATUS, RUN, STANDING = "/mycel/status", "/mycel/run", "/mycel/standing"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: mycel\r\n\r\n"


@dataclass
class Desk:
    """Serves operators.

    Parameters
    ----------
    address : str
        Where the coordinator listens.
    line : Path
        Where its SuperLink's apps dial.
    """

    address: str
    line: Path
    _beginning: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def serve(self, path: str, body: bytes, caller: Side) -> None:
        """Answer one request; a run's line takes the connection over until either side hangs up."""
        try:
            if path == STATUS:
                await caller.answer(200, json.dumps(overview(self.address)).encode())
            elif path == STANDING:
                await caller.answer(200, self._note(body))
            elif path == RUN:
                await self._run(body.decode(), caller)
            else:
                await caller.answer(404, b"there is no such thing here")
        except (MycelError, ValueError) as error:
            await caller.answer(502, str(error).encode())

    def _note(self, body: bytes) -> bytes:
        content = json.loads(body)
        if not isinstance(content, dict):
            raise ValueError("the standing of a run is a table")
        write_status(self.address, content)
        return b""

    async def _run(self, job: str, caller: Side) -> None:
        async with self._beginning:  # ServerApps all dial at one place
            near = await begin(state_folder("coordinators", self.address), self.line, job)
        reader, writer = await asyncio.open_unix_connection(sock=near)
        caller.writer.write(SWITCH)
        await join((caller.reader, caller.writer), (reader, writer))


async def join(
    one: tuple[asyncio.StreamReader, asyncio.StreamWriter], other: tuple[asyncio.StreamReader, asyncio.StreamWriter]
) -> None:
    """Pass bytes on between two connections until either ends, then close both."""
    ways = [asyncio.ensure_future(_pump(one[0], other[1])), asyncio.ensure_future(_pump(other[0], one[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for _, writer in (one, other):
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(CHUNK):
            writer.write(piece)
            await writer.drain()
