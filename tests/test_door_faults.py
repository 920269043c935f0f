"""What goes wrong beside a request costs that request at most: a full disk, a choice too many, a stuck client."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp

from mycel.door import sending
from mycel.door.run import configured
from mycel.door.sending import Parts
from mycel.errors import EngineError
from mycel.generation.batched import Batched, Ticket
from mycel.generation.request import Request, Sampling, Token
from mycel.generation.sampling import Sampler
from mycel.generation.served import Served
from mycel.generation.service import Service
from mycel.testing.doors import standing
from small_models import micro, write_adapter_folder
from test_swarm_door import imagined_served

ASKED = {"model": "imagined", "prompt": "x = ", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


def service_of(served: Served) -> Service:
    assert isinstance(served.backend, Service)
    return served.backend


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_ends_the_journal_and_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "requests.jsonl").symlink_to("/dev/full")
    with standing(imagined_served(), tmp_path) as address:
        for stream in (False, True, False):
            answer = httpx.post(f"{address}/v1/completions", json={**ASKED, "stream": stream}, timeout=120)
            assert answer.status_code == 200
        assert httpx.get(f"{address}/metrics", timeout=120).status_code == 200
    assert caplog.text.count("cannot be written") == 1
    assert "No space left" in caplog.text


def test_what_fails_when_a_request_is_let_go_fails_nobody_else() -> None:
    served = imagined_served()
    service, seen = service_of(served), list[int]()

    def forget(sequence: int) -> None:
        seen.append(sequence)
        raise EngineError("the peers are gone")

    async def leave_one_and_read_another() -> list[Token]:
        left = service.bursts(Request((5, 6), 900))
        await anext(left)
        await left.aclose()
        return [token async for token in service.stream(Request((5, 6), 8))]

    service.engine.executor.forget = forget  # type: ignore[method-assign]
    try:
        for _ in range(3):
            assert len(asyncio.run(asyncio.wait_for(leave_one_and_read_another(), 20))) == 8
        assert service._thread.is_alive()
        until(lambda: service.engine.pool.held == 0)
    finally:
        service.engine.executor.forget = lambda sequence: None  # type: ignore[method-assign]
        served.backend.close()
    assert seen


def slow(served: Served) -> Served:
    """Let each iteration take a moment."""
    run = service_of(served).engine.executor.run

    def slowly(pieces: Any) -> torch.Tensor:
        time.sleep(0.002)
        return run(pieces)

    service_of(served).engine.executor.run = slowly  # type: ignore[method-assign]
    return served


def test_a_choice_too_many_ends_its_request_at_once_and_one_that_can_never_be_is_bad() -> None:
    served = slow(imagined_served())
    service = service_of(served)
    service.most = 4
    with standing(served) as address:

        def ask(**more: Any) -> httpx.Response:
            return httpx.post(f"{address}/v1/completions", json={**ASKED, **more}, timeout=120)

        never = ask(n=3, prompt=["a", "b"])
        assert never.status_code == 400
        assert "6 choices" in never.json()["error"]["message"]
        assert ask(n=4).status_code == 200
        with httpx.stream(
            "POST", f"{address}/v1/completions", json={**ASKED, "max_tokens": 900, "stream": True}, timeout=120
        ) as one:
            lines = one.iter_lines()
            next(lines)
            counted = service.engine.counts.generated
            busy = ask(n=4, max_tokens=900)
            assert busy.status_code == 429
            assert int(busy.headers["retry-after"]) >= 1
            assert service.engine.counts.generated - counted < 4 * 900, "the other choices were finished for nobody"
            until(lambda: service.engine.waiting <= 1)
        until(lambda: service.unfinished == service.engine.waiting == 0)


def test_tokens_that_came_together_are_one_part_and_none_is_late() -> None:
    """A reader that keeps up gets every token as it is made; one that does not gets all that wait, in order."""
    served = imagined_served()
    service, gate = service_of(served), threading.Semaphore(0)
    run = service.engine.executor.run

    def gated(pieces: Any) -> torch.Tensor:
        gate.acquire()
        return run(pieces)

    service.engine.executor.run = gated  # type: ignore[method-assign]

    async def read() -> list[int]:
        sizes = []
        bursts = service.bursts(Request((5, 6), 12))
        for _ in range(4):
            gate.release()
            sizes.append(len(await anext(bursts)))
        for _ in range(8):
            gate.release()
        while service.engine.waiting:
            await asyncio.sleep(0.001)
        return sizes + [len(burst) async for burst in bursts]

    try:
        assert asyncio.run(read()) == [1, 1, 1, 1, 8]
    finally:
        served.backend.close()


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(configured(app))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("leaves", [False, True], ids=["takes nothing", "leaves"])
def test_a_client_that_is_stuck_or_leaves_is_given_up(leaves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PATIENCE", 0.2 if not leaves else 60.0)
    made, over = list[int](), threading.Event()

    async def endless() -> AsyncGenerator[bytes]:
        while True:
            made.append(1)
            yield bytes(1 << 20)
            await asyncio.sleep(0)

    async def released() -> None:
        over.set()

    with listening(Parts(endless(), 200, {}, release=released)) as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"
        if leaves:
            client.close()
        assert over.wait(20)
        assert len(made) < 200, "parts were made for somebody who takes none"
        client.close()


def test_offsets_of_named_tokens_are_the_same_in_pieces_and_whole() -> None:
    with standing(imagined_served()) as address:
        asked = {**ASKED, "logprobs": 1}
        whole = httpx.post(f"{address}/v1/completions", json=asked, timeout=120).json()["choices"][0]["logprobs"]
        said = httpx.post(f"{address}/v1/completions", json={**asked, "stream": True}, timeout=120).text.split("\n\n")
        pieces = [json.loads(line[6:])["choices"][0]["logprobs"] for line in said if line.startswith("data: {")]
    offsets = [offset for piece in pieces for offset in piece["text_offset"]]
    assert offsets == whole["text_offset"]
    names = whole["tokens"]
    assert offsets == [len("".join(names[:index])) for index in range(len(names))]


def test_a_damaged_folder_on_the_shelf_hides_no_other_adapter(tmp_path: Path) -> None:
    base = micro()
    write_adapter_folder(base, tmp_path / "good", seed=1)
    write_adapter_folder(base, tmp_path / "half", seed=2)
    os.unlink(tmp_path / "half" / "adapter_model.safetensors")
    served = imagined_served()
    served.shelf = tmp_path
    try:
        assert served.names() == ["imagined", "imagined:good"]
        write_adapter_folder(base, tmp_path / "half", seed=2)  # it was only being copied
        assert served.names() == ["imagined", "imagined:good", "imagined:half"]
    finally:
        served.backend.close()


@given(st.floats(1e-300, 1e-3), st.integers(0, 2**32))
def test_the_smallest_temperatures_draw_the_likeliest_token(temperature: float, seed: int) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed % 1000)) * 1e4
    sampler = Sampler(Sampling(temperature, seed=seed))
    found = sampler.distribution(logits)
    assert torch.isfinite(found).all()
    assert float(found.sum()) == pytest.approx(1.0)
    assert sampler.draw(found) == int(logits.argmax())


class _Echo(Batched):
    """Gives every request its prompt, and refuses to be asked twice at a time."""

    def alike(self, request: Request) -> int:
        return len(request.prompt) % 3

    def generate(self, tickets: Any) -> None:
        assert len({self.alike(ticket.request) for ticket in tickets}) == 1
        for ticket in tickets:
            for token in ticket.request.prompt:
                ticket.give(token)


def test_a_queue_that_many_threads_fill_loses_nobody() -> None:
    tokenizer = micro().tokenizer
    backend = _Echo(tokenizer, len(tokenizer), 1024, 4096, 8)

    async def ask(seed: int) -> None:
        for count in range(60):
            prompt = tuple(5 + (seed + count + index) % 40 for index in range(1 + (seed + count) % 7))
            found = [token async for token in backend.stream(Request(prompt, len(prompt)))]
            assert tuple(token.id for token in found) == prompt

    threads = [threading.Thread(target=lambda seed=seed: asyncio.run(ask(seed))) for seed in range(6)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert backend._thread.is_alive()
        assert backend.unfinished == 0
    finally:
        backend.close()


def test_a_ticket_that_cannot_be_read_out_fails_alone_and_is_told() -> None:
    told: list[Token] = []

    class Broken:
        stopped = False

        def finish(self) -> str:
            raise ValueError("no text")

    ticket = Ticket(Request((5,), 1), told.append, Broken())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no text"):
        ticket.finish("stop")
    ticket.finish("error")
    assert [token.reason for token in told] == ["error"]
