"""A line that both ends trust, so that it knows the messages which it cuts off in their middle, each kind once.

It can also answer in the SuperLink's place that a run has ended, which a node may hear in the middle of a message.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mycel.guard.gates import client_context, server_context
from thin_line import serving

KINDS = (
    "activate-node",
    "send-node-heartbeat",
    "pull-messages",
    "get-run",
    "get-fab",
    "pull-object",
    "confirm-message-received",
    "push-messages",
    "push-object",
)
WAYS = ("asked", "answered")
ENDED = ("confirm-message-received", "ended")
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"


class CuttingLine:
    """Passes requests and answers on; the first of each kind that is due gets half through, and both ends are cut."""

    def __init__(self, target: tuple[str, int], context: ssl.SSLContext, due: set[tuple[str, str]]) -> None:
        self.target, self.context, self.due = target, context, due

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target, ssl=self.context)
            writers.append(far_writer)
            kind = ""
            while True:
                for way, source, sink in (("asked", reader, far_writer), ("answered", far_reader, writer)):
                    head = await source.readuntil(b"\r\n\r\n")
                    if way == "asked":
                        kind = head.split()[1].decode().rpartition("/")[2]
                    elif (kind, "ended") in self.due:
                        self.due.discard((kind, "ended"))
                        await source.readexactly(_length(head))
                        writer.write(FORBIDDEN)
                        continue
                    if await self._pass(head, source, sink, (kind, way)):
                        return
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            for each in writers:
                each.transport.abort()

    async def _pass(
        self, head: bytes, source: asyncio.StreamReader, sink: asyncio.StreamWriter, message: tuple[str, str]
    ) -> bool:
        """Pass a message on; return whether it was cut."""
        length = _length(head)
        cut = message in self.due and (message != ("pull-messages", "answered") or length > 0)
        if cut:
            self.due.discard(message)
        left = (len(head) + length) // 2 if cut else len(head) + length
        piece = head
        while left:
            sink.write(piece[:left])
            await sink.drain()
            left -= min(len(piece), left)
            if left and not (piece := await source.read(1 << 16)):
                raise ConnectionError
        return cut


def _length(head: bytes) -> int:
    lines = head.lower().split(b"\r\n")
    return int(next(line for line in lines if line.startswith(b"content-length:")).split(b":")[1])


@contextmanager
def cutting_line(target: tuple[str, int], keys: Path, party: str, due: set[tuple[str, str]]) -> Iterator[int]:
    """Open a line for ``party`` to ``target`` and yield its port; what is cut leaves ``due``."""
    line = CuttingLine(target, client_context(keys / "authority.crt", keys / "parties" / f"{party}.pem"), due)
    with serving(line.serve, server_context(keys / "coordinator.pem", keys / "authority.crt")) as port:
        yield port
