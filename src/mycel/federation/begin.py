"""Begin Flower's run on the coordinator's own machine, for whoever is to decide in it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from mycel.engines.flower.launch import has_ended, submit
from mycel.engines.line import listen, place_of
from mycel.errors import EngineError

LOOK_AFTER = 5.0  # seconds between looks whether the ServerApp has failed


async def begin(home: Path, line: Path, job: str) -> socket.socket:
    """Submit Flower's run, whose parties are told ``job``, and return the line that its ServerApp opens.

    Parameters
    ----------
    home : Path
        The coordinator's folder.
    line : Path
        Where its SuperLink's apps dial.
    """
    own = place_of(line, job)
    with listen(own) as door:
        door.setblocking(False)
        number = await asyncio.to_thread(submit, home, job)
        dialled = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(door))
        try:
            while not (await asyncio.wait([dialled], timeout=LOOK_AFTER))[0]:
                if await asyncio.to_thread(has_ended, home, number):
                    words = f"{str(home / 'superlink.log')!r} says why"
                    raise EngineError(f"Flower's ServerApp ended before it began: {words}")
            return dialled.result()[0]
        finally:
            dialled.cancel()
            own.unlink(missing_ok=True)
