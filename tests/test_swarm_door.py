"""A door over peers that leave, lie and are missing: the whole model's text, or a sentence that says why not."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest

from mycel.door.journal import Journal
from mycel.door.swarm import SwarmService, swarm_served
from mycel.generation.engine import Engine, Limits
from mycel.generation.served import Served
from mycel.generation.service import Service
from mycel.generation.simulator import Clock, Costs, Imagined
from mycel.models.base import Base
from mycel.report import write_serving_report
from mycel.report.journal import State, read_journal
from mycel.segments.client import SwarmModel
from mycel.serve.gateway import visit
from mycel.testing.doors import standing
from small_models import greedy_text, micro
from swarms import Bench, bench
from test_segments import _Liar

PROMPTS = ["def add(first, second):\n    ", "import ", "class Name:\n"]
TOKENS = 24


@pytest.fixture(scope="module")
def base() -> Base:
    return micro()


class Hosted:
    """A door over a swarm in memory, and what a test does to the swarm."""

    def __init__(self, base: Base, address: str, found: Bench, service: SwarmService) -> None:
        self.base, self.address, self.swarm, self.service = base, address, found, service

    def on_loop(self, work: object) -> object:
        return asyncio.run_coroutine_threadsafe(work, self.service.hall.loop).result()  # type: ignore[arg-type]

    def ask(self, prompt: str, most: int = TOKENS) -> httpx.Response:
        body = {"model": "micro", "prompt": prompt, "max_tokens": most, "temperature": 0}
        return httpx.post(f"{self.address}/v1/completions", json=body, timeout=120)

    def says_what_the_whole_model_says(self) -> None:
        for prompt in PROMPTS:
            assert self.ask(prompt).json()["choices"][0]["text"] == greedy_text(self.base, prompt, TOKENS)


@contextmanager
def hosted(
    base: Base, ranges: list[tuple[int, int]], patience: float = 5.0, log: Path | None = None
) -> Iterator[Hosted]:
    found: list[Bench] = []

    @asynccontextmanager
    async def opening() -> AsyncIterator[SwarmModel]:
        async with bench(base.folder, ranges, patience=patience) as made:
            found.append(made)
            yield made.model

    served = swarm_served("micro", base.folder, opening(), 16)
    with standing(served, log) as address:
        assert isinstance(served.backend, SwarmService)
        yield Hosted(base, address, found[0], served.backend)


def test_a_peer_killed_in_the_middle_of_a_streamed_answer_is_not_noticed_and_is_reported(
    base: Base, tmp_path: Path
) -> None:
    # Answers of milliseconds teach deadlines that a busy machine misses; who is killed is missed at once all the same.
    with hosted(base, [(0, 1), (1, 2), (0, 2)], patience=1e4, log=tmp_path) as door:
        body = {"model": "micro", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0, "stream": True}
        said = []
        victim = ""
        with httpx.stream("POST", f"{door.address}/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    said.append(json.loads(line[6:])["choices"][0]["text"])
                if len(said) == 8 and not victim:  # there are lines between the tokens, too
                    (session,) = door.service.engine.executor.sessions.values()  # type: ignore[attr-defined]
                    victim = session.hops[0].leg.peer
                    door.service.hall.loop.call_soon_threadsafe(door.swarm.member(victim).kill)
        assert "".join(said) == greedy_text(base, PROMPTS[0], TOKENS)
        door.says_what_the_whole_model_says()
        assert door.ask(PROMPTS[0], 100_000).status_code == 400
    events = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    lost = [event for event in events if event.get("event") == "lost"]
    assert [event["peer"] for event in lost] == [victim]
    assert {event["peer"] for event in events if event.get("event") == "holds"} == {"peer-0", "peer-1", "peer-2"}
    page = write_serving_report(tmp_path).read_text(encoding="utf-8")
    assert 'id="holdings"' in page
    assert "took over" in page
    assert "could not be answered as asked (400)" in page


@pytest.mark.parametrize("how", ["shape", "nan", "slow"])
def test_peers_that_lie_or_dawdle_change_no_text(base: Base, how: str) -> None:
    with hosted(base, [(0, 1)]) as door:
        door.on_loop(door.swarm.lend("liar", 1, 2, type(f"Liar{how}", (_Liar,), {"how": how})))
        door.on_loop(door.swarm.lend("honest", 1, 2))
        door.on_loop(asyncio.sleep(0.05))
        door.says_what_the_whole_model_says()


def test_a_missing_block_is_named_after_patience_and_served_when_it_comes(base: Base) -> None:
    with hosted(base, [(0, 1)], patience=0.3) as door:
        answer = door.ask(PROMPTS[0])
        assert answer.status_code == 503
        assert "no peer of the swarm holds block 1" in answer.json()["error"]["message"]
        door.service.hall.model.patience = 60.0  # a busy machine may be late twice in a row
        door.on_loop(door.swarm.lend("late", 0, 2))
        door.says_what_the_whole_model_says()


def test_many_requests_leave_no_more_behind_than_few(tmp_path: Path) -> None:
    served = imagined_served()
    with standing(served, tmp_path) as address:
        service = served.backend
        assert isinstance(service, Service)

        def held(requests: int) -> int:
            """Ask in every way, good and bad, wait until all of it is over, and count live objects."""
            found = asyncio.run(visit(address, _various, 8, requests // 8))
            asyncio.run(_vanish(address, requests // 40))
            while service.unfinished or service.engine.waiting:
                time.sleep(0.001)
            assert len(found.seconds) + found.lost == requests
            gc.collect()
            return len(gc.get_objects())

        held(200)
        few, journal = held(200), (tmp_path / "requests.jsonl").stat().st_size
        many = held(1200)
        assert abs(many - few) < 100, "requests leave objects behind"
        assert service.engine.pool.held == service.engine.aside.bytes == 0
        assert (tmp_path / "requests.jsonl").stat().st_size < 6 * journal


def test_a_journal_begins_anew_when_it_is_long(tmp_path: Path) -> None:
    journal = Journal(tmp_path, most=2000)
    for number in range(100):
        journal.event("state", requests=number, pages=0, of=1)
    journal.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"requests.jsonl", "requests.1.jsonl"}
    assert all(size < 2100 for size in sizes.values())
    read = read_journal(tmp_path)
    assert [event.requests for event in read.of(State)][-1] == 99


def imagined_served() -> Served:
    """Return an engine that gives tokens at once, for what is measured beside it."""
    tokenizer = micro().tokenizer
    engine = Engine(Imagined(Costs(0.0, 0.0, 0.0), Clock(), 1024, 64), tokenizer, Limits(memory=64 * 16 * 8192))
    engine.executor.vocabulary = len(tokenizer)
    return Served("imagined", tokenizer, Service(engine, most=64))


def _various(number: int) -> dict[str, object]:
    asked = {"model": "imagined", "prompt": f"value_{number % 13} = ", "max_tokens": 3, "stream": number % 3 == 0}
    wrong = ({"temperature": -1}, {"model": "none"}, {"max_tokens": 10**6}, {"stop": [""]})
    return asked | (wrong[number // 16 % 4] if number % 16 == 5 else {})


async def _vanish(address: str, count: int) -> None:
    """Leave streams after their first piece."""
    async with httpx.AsyncClient(base_url=address) as client:
        for _ in range(count):
            body = {"model": "imagined", "prompt": "x", "max_tokens": 500, "stream": True, "ignore_eos": True}
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    break
