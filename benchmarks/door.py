"""What the door adds to the engine, and whether it loses anybody while clients come and go; loopback only.

Added latency: a stand-in engine gives each request its tokens at once, so whatever a client waits for is the door:
reading, checking, tokenising, forming the answer, the socket. The same engine is asked in process as the baseline.
Coming and going: 200 clients at once, each asks five times; every third request leaves its stream after two tokens.
Counted: every request that stayed has its whole answer, and in the end the engine holds nothing.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import httpx
import uvicorn
from transformers import AutoTokenizer

from common import arguments, show
from mycel.door.app import Door
from mycel.door.run import configured
from mycel.generation.engine import Engine, Limits
from mycel.generation.request import Request
from mycel.generation.served import Served
from mycel.generation.service import Service
from mycel.generation.simulator import Clock, Costs, Imagined
from mycel.models.base import find_base

TOKENS = 16
CLIENTS, TURNS = 200, 5


@contextmanager
def standing(served: Served) -> Iterator[str]:
    """Stand at a door in this process, on a free port of loopback."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    server = uvicorn.Server(configured(Door(served).app))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        served.backend.close()


def stand_in() -> Served:
    tokenizer = AutoTokenizer.from_pretrained(find_base("micro"))
    limits = Limits(memory=64 * 16 * 8192, share=False)
    engine = Engine(Imagined(Costs(0.0, 0.0, 0.0), Clock(), 1024, 64), tokenizer, limits)
    engine.executor.vocabulary = len(tokenizer)
    return Served("stand-in", tokenizer, Service(engine, most=2 * CLIENTS))


def body(stream: bool, most: int = TOKENS) -> dict[str, Any]:
    return {"model": "stand-in", "prompt": "def add(a, b):", "max_tokens": most, "stream": stream, "ignore_eos": True}


async def in_process(served: Served, count: int) -> list[float]:
    ids = tuple(served.tokenizer("def add(a, b):")["input_ids"])
    times = []
    for _ in range(count):
        started = time.perf_counter()
        async for _ in served.backend.stream(Request(ids, TOKENS)):
            pass
        times.append(time.perf_counter() - started)
    return times


def through_door(address: str, count: int, stream: bool) -> list[float]:
    """Ask over one kept connection, with a client that itself takes next to no time."""
    connection = HTTPConnection(address.removeprefix("http://"))
    times, asked = [], json.dumps(body(stream))
    for _ in range(count):
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", asked)
        answer = connection.getresponse()
        answer.read()
        times.append(time.perf_counter() - started)
        assert answer.status == 200
    connection.close()
    return times


async def come_and_go(address: str) -> tuple[int, int, int]:
    """Return answers whole, streams left on purpose, and requests lost."""
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    whole = left = lost = 0
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as client:

        async def visit(number: int) -> None:
            nonlocal whole, left, lost
            for turn in range(TURNS):
                leaves = (number + turn) % 3 == 0
                async with client.stream(
                    "POST", "/v1/completions", json=body(True, 200 if leaves else TOKENS)
                ) as answer:
                    seen, last = 0, ""
                    async for line in answer.aiter_lines():
                        seen += line.startswith("data: {")
                        last = line or last
                        if leaves and seen == 2:
                            break
                if leaves:
                    left += 1
                elif answer.status_code == 200 and seen == TOKENS and last == "data: [DONE]":
                    whole += 1
                else:
                    lost += 1

        await asyncio.gather(*(visit(number) for number in range(CLIENTS)))
    return whole, left, lost


def measure(count: int) -> list[dict[str, Any]]:
    served = stand_in()
    service = served.backend
    assert isinstance(service, Service)
    with standing(served) as address:
        through_door(address, 20, stream=True)
        bare = asyncio.run(in_process(served, count))
        rows = []
        for name, stream in (("whole answer", False), ("streamed", True)):
            times = through_door(address, count, stream)
            added = statistics.median(times) - statistics.median(bare)
            rows.append({"what": f"added, {name}", "median ms": round(added * 1e3, 2), "count": count, "lost": 0})
        started = time.perf_counter()
        whole, left, lost = asyncio.run(come_and_go(address))
        seconds = time.perf_counter() - started
        ends = time.monotonic() + 10
        while (service.unfinished or service.engine.pool.held) and time.monotonic() < ends:
            time.sleep(0.01)
        held = service.engine.pool.held
    what = f"{CLIENTS} clients, {whole} whole, {left} left, {held} pages held after"
    rows.append({"what": what, "median ms": round(seconds / TURNS * 1e3, 2), "count": CLIENTS * TURNS, "lost": lost})
    return rows


def main() -> None:
    options = arguments(__doc__ or "", count={"type": int, "default": 200})
    show(f"The door, {TOKENS} tokens a request", measure(options.count), options.json)


if __name__ == "__main__":
    main()
