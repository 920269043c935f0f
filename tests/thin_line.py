"""A thin line between two TCP ends: delay, a bound on the rate, and stalls where a packet would have been lost."""

from __future__ import annotations

import asyncio
import random
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

PIECE = 1448  # bytes of a packet


class ThinLine:
    """Passes bytes on as a bad network would; a lost packet costs the time of its retransmission."""

    def __init__(self, target: tuple[str, int], delay: float, rate: float, loss: float) -> None:
        self.target, self.delay, self.rate, self.loss = target, delay, rate, loss
        self.port, self.passed, self.stalls = 0, 0, 0
        self._luck = random.Random(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self.target)
        pumps = [self._pump(reader, far_writer), self._pump(far_reader, writer)]
        await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def deliver() -> None:
            while True:
                moment, piece = await waiting.get()
                await asyncio.sleep(max(moment - loop.time(), 0.0))
                if not piece:
                    writer.close()
                    return
                writer.write(piece)
                await writer.drain()

        task = asyncio.ensure_future(deliver())
        free = loop.time()
        with suppress(ConnectionError):
            while piece := await reader.read(16 * PIECE):
                lost = sum(self._luck.random() < self.loss for _ in range(-(-len(piece) // PIECE)))
                self.stalls += lost
                self.passed += len(piece)
                free = max(free, loop.time()) + len(piece) / self.rate + 2 * self.delay * min(lost, 1)
                await waiting.put((free + self.delay, piece))
        await waiting.put((0.0, b""))
        await task


@contextmanager
def thin_line(target: tuple[str, int], delay: float, rate: float, loss: float) -> Iterator[ThinLine]:
    """Open a line to ``target``: seconds of delay one way, bytes a second in all, share of packets lost."""
    line = ThinLine(target, delay, rate, loss)
    with serving(line.serve) as line.port:
        yield line


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def serving(serve: Serve, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve on a port of the loopback, which is yielded, in a thread of its own."""
    ready, ports = threading.Event(), []
    loop = asyncio.new_event_loop()

    async def program() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    task = loop.create_task(program())
    thread = threading.Thread(target=lambda: _until_cancelled(loop, task), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def _until_cancelled(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.run_until_complete(asyncio.sleep(0.1))
    loop.close()
