"""What the door adds to the engine, and whether it loses anybody while clients come and go; loopback only.

Added latency: a stand-in engine gives each request its tokens at once, so whatever a client waits for is the door:
reading, checking, tokenising, forming the answer, the socket. The same engine is asked in process as the baseline.
Coming and going: 200 clients at once, each asks five times; every third request leaves its stream after two tokens.
Counted: every request that stayed has its whole answer, and in the end the engine holds nothing.

``--part gateways``: the same engine behind its own door, behind a gateway that hands bytes on, and behind one that
reads, checks and writes anew whatever passes, as gateways commonly do; alone and with 64 clients; processes each.
``--part memory``: a real model asked 10,000 times, with what the server holds after each thousand.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from http.client import HTTPConnection
from typing import Any

import httpx
import psutil
from transformers import AutoTokenizer

from common import arguments, proportional_bytes, show
from mycel.door.app import Door
from mycel.door.run import listen
from mycel.generation.engine import Engine, Limits
from mycel.generation.request import Request
from mycel.generation.served import Served
from mycel.generation.service import Service
from mycel.generation.simulator import Clock, Costs, Imagined
from mycel.models.base import find_base
from mycel.serve.gateway import process, visit
from mycel.testing.doors import standing

TOKENS = 16
CLIENTS, TURNS = 200, 5


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


def added(count: int) -> list[dict[str, Any]]:
    served = stand_in()
    service = served.backend
    assert isinstance(service, Service)
    with standing(served) as address:
        through_door(address, 20, stream=True)
        bare = asyncio.run(in_process(served, count))
        rows = []
        for name, stream in (("whole answer", False), ("streamed", True)):
            times = through_door(address, count, stream)
            more = statistics.median(times) - statistics.median(bare)
            rows.append({"what": f"added, {name}", "median ms": round(more * 1e3, 2), "count": count, "lost": 0})
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


def gateways(count: int) -> list[dict[str, Any]]:
    """Ask the door, and the same door behind gateways: one that hands bytes on, one that reads and writes them anew."""
    rows = []
    with process(__file__, "--part", "engine") as engine, process("-m", "mycel.serve.gateway", engine) as heavy:
        onward = ("-m", "mycel", "serve", "any", "--engine", "vllm", "--remote", engine, "--port", "0")
        with process(*onward) as thin:
            for name, address in (("door", engine), ("bytes handed on", thin), ("read and written anew", heavy)):
                for stream in (False, True):
                    asyncio.run(visit(address, lambda _: body(stream), 4, 5))  # noqa: B023
                    alone = asyncio.run(visit(address, lambda _: body(stream), 1, count))  # noqa: B023
                    many = asyncio.run(visit(address, lambda _: body(stream), 64, max(1, count // 16)))  # noqa: B023
                    rows.append(
                        {
                            "what": f"{name}, {'streamed' if stream else 'whole'}",
                            "median ms alone": round(statistics.median(alone.seconds) * 1e3, 2),
                            "median ms of 64": round(statistics.median(many.seconds) * 1e3, 1),
                            "requests/s of 64": round(len(many.seconds) / many.took, 1),
                            "lost": alone.lost + many.lost,
                        }
                    )
    return rows


def memory(count: int) -> list[dict[str, Any]]:
    """Ask ten times ``count`` requests of a real model, good and bad ones, and look at the server after each tenth."""
    rows = []
    options = ["--port", "0", "--memory", "8MiB", "--log"]
    with tempfile.TemporaryDirectory() as log, process("-m", "mycel", "serve", "micro", *options, log) as address:
        (server,) = [child for child in psutil.Process().children() if "serve" in child.cmdline()]
        for tenth in range(10):
            seen = asyncio.run(visit(address, various, 16, count // 16))
            ends = time.monotonic() + 10
            while gauge(address, "mycel_unfinished_requests") and time.monotonic() < ends:
                time.sleep(0.01)
            rows.append(
                {
                    "requests": (tenth + 1) * (count // 16) * 16,
                    "memory MiB": round(proportional_bytes(server.pid) / 2**20, 1),
                    "pages held": gauge(address, "mycel_pages_held"),
                    "open files": server.num_fds(),
                    "threads": server.num_threads(),
                    "refused as bad": seen.lost,
                    "seconds": round(seen.took, 1),
                }
            )
    return rows


def various(number: int) -> dict[str, Any]:
    """Return one of many requests: prompts that differ, some streamed, one in sixteen impossible."""
    asked = {"model": "micro", "prompt": f"value_{number % 97} = ", "max_tokens": 2, "stream": number % 3 == 0}
    return asked | ({"temperature": -1} if number % 16 == 5 else {})


def gauge(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics").text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


def stand(_: int) -> list[dict[str, Any]]:
    """Be the stand-in's server for another process, until ended."""
    listen(Door(stand_in()).app, "127.0.0.1", 0, lambda address: print(f"at {address}/v1", file=sys.stderr, flush=True))
    return []


PARTS = {"added": added, "gateways": gateways, "memory": memory, "engine": stand}
TITLES = {"added": f"The door, {TOKENS} tokens a request", "gateways": "Gateways", "memory": "Memory of a server"}


def main() -> None:
    options = arguments(
        __doc__ or "",
        part={"choices": sorted(PARTS), "default": "added"},
        count={"type": int, "default": 0, "help": "requests of a part; 0: 200, and 1,000 for memory"},
    )
    count = options.count or (1000 if options.part == "memory" else 200)
    rows = PARTS[options.part](count)
    if rows:
        show(TITLES[options.part], rows, options.json)


if __name__ == "__main__":
    main()
