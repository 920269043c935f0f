"""Begin Flower's run on the coordinator's own machine, for whoever is to decide in it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

from mycel.engines.flower.launch import has_ended, submit
from mycel.engines.line import listen, place_of
from mycel.errors import EngineError

STARTS = 3  # of a ServerApp that ends before it has begun, as one may on a machine that has no memory or time left
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
        dialled = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(door))
        try:
            for _ in range(STARTS):
                number = await asyncio.to_thread(submit, home, job)
                if await _has_come(dialled, home, number):
                    return dialled.result()[0]
            words = f"{str(home / 'superlink.log')!r} says why"
            raise EngineError(f"Flower's ServerApp ended {STARTS} times before it began: {words}")
        finally:
            dialled.cancel()
            own.unlink(missing_ok=True)


async def _has_come(dialled: asyncio.Future[Any], home: Path, number: str) -> bool:
    """Wait for a ServerApp's call; return whether it came before the ServerApp's end."""
    while not (await asyncio.wait([dialled], timeout=LOOK_AFTER))[0]:
        if await asyncio.to_thread(has_ended, home, number):
            return dialled.done()
    return True
