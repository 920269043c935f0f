"""A peer that many share keeps its limits, and what one of them does costs no other."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoders import decoder
from mycel.engines.calls import CALL, HEADER
from mycel.engines.peers_memory import MemorySwarm
from mycel.errors import EngineError, GenerationError
from mycel.models.cut import Cut
from mycel.segments.client import Turn
from mycel.segments.executor import Pipeline
from mycel.segments.host import AT_ONCE
from mycel.segments.keys import START, Slab
from mycel.segments.lender import RESERVE, Lender, weigh
from mycel.segments.segment import MOST_PENDING, Row, Segment
from mycel.segments.session import Session
from mycel.segments.training import Chain
from swarms import bench
from test_segments import COUNT, PROMPTS, greedy, together


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    decoder("llama").save_pretrained(place)
    return place


ALONE = decoder("llama")
POSITION = 8 * ALONE.config.num_key_value_heads * ALONE.config.head_dim  # bytes of keys and values in one block


@pytest.mark.parametrize("slab", [Slab(sessions=3), Slab(memory=60 * POSITION)], ids=["few sessions", "few bytes"])
def test_more_sessions_than_a_peer_has_room_for_cost_time_and_no_token(folder: Path, slab: Slab) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 4)]) as made:
            made.hosts[0].segment.slab = slab
            wanted = [greedy(folder, prompt, 6) for prompt in PROMPTS]
            found = await asyncio.gather(*(together(made.model, PROMPTS, 6) for _ in range(2)))
            assert found == [wanted, wanted]
            assert made.model.replays, "there was room for everybody"
            assert not made.model.directory.known["peer-0"].strikes
            with pytest.raises(EngineError, match="sessions"):
                slab.enter([Row(str(index), 0, 1) for index in range(slab.most + 1)])

    asyncio.run(check())


STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.booleans()), min_size=1, max_size=14)


@settings(max_examples=20, deadline=None)
@given(STEPS, st.integers(24, 60))
def test_a_slab_in_a_limit_forgets_whole_sessions_and_changes_none(
    steps: list[tuple[int, int, bool]], room: int
) -> None:
    """Whatever comes, a session that is held gives what it gives alone, and memory stays below the limit."""
    generator = torch.Generator().manual_seed(room)
    cut = Cut.of(ALONE)
    segment, sent = Segment(cut, 1, 3, Slab(memory=room * POSITION)), dict[str, torch.Tensor]()
    for who, count, anew in steps:
        name, new = str(who), torch.randn(count, segment.width, generator=generator)
        start = 0 if anew or segment.slab.lengths.get(name) is None else segment.slab.lengths[name]
        whole = torch.cat([sent[name], new]) if start else new
        if len(whole) > room:
            continue
        sent[name] = whole
        found = segment.infer(new, [Row(name, start, count)])
        with torch.inference_mode():
            torch.testing.assert_close(found, cut.run(whole[None], 1, 3)[0, start:], rtol=1e-4, atol=1e-5)
        for keys, values in segment.slab.layers.values():
            assert (keys.nbytes + values.nbytes) / POSITION <= max(room, START)
        assert all(length == len(sent[held]) for held, length in segment.slab.lengths.items())


def test_a_session_that_ends_while_others_are_computed_costs_them_nothing(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 4)]) as made:
            host, run = made.hosts[0], made.hosts[0].segment.cut.run
            prompt = list(range(3, 3 + 2 * AT_ONCE))  # so long that another thread computes it

            def slowly(*given: Any, **more: Any) -> torch.Tensor:
                time.sleep(0.02)
                return run(*given, **more)

            host.segment.cut.run = slowly  # type: ignore[method-assign]
            right = await made.model.step([Turn(Session(), prompt)])
            leaving = [Session() for _ in range(4)]
            steps = [asyncio.create_task(made.model.step([Turn(each, prompt)])) for each in leaving]
            while not host._busy:
                await asyncio.sleep(0.001)
            staying = asyncio.create_task(made.model.step([Turn(Session(), prompt)]))
            await asyncio.sleep(0.03)
            for task in steps:
                task.cancel()
            await asyncio.gather(*steps, return_exceptions=True)
            await made.model.forget(leaving)
            torch.testing.assert_close(await staying, right, rtol=1e-4, atol=1e-5)
            assert not made.model.directory.known["peer-0"].strikes
            assert made.model.replays == 0
            await asyncio.sleep(0.05)
            assert len(host.segment.slab.lengths) == len(host.segment.slab.slots) == 2

    asyncio.run(check())


def test_owners_that_only_look_forward_do_not_close_a_peer_to_training(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 4)]) as made:
            states = torch.randn(1, 2, made.model.width, generator=torch.Generator().manual_seed(0))
            for _ in range(MOST_PENDING + 4):
                await Chain(made.model).forward(states)
            chain = Chain(made.model)
            out = await chain.forward(states)
            gradient = await chain.backward(torch.ones_like(out))
            whole, entered = Cut.of(ALONE), states.clone().requires_grad_()
            whole.run(entered, 0, 4).sum().backward()  # type: ignore[no-untyped-call]
            torch.testing.assert_close(gradient, entered.grad, rtol=1e-3, atol=1e-5)
            assert len(made.hosts[0].segment._pending) <= MOST_PENDING

    asyncio.run(check())


def test_a_lender_that_cannot_move_says_so_serves_on_and_moves_later(folder: Path) -> None:
    async def check() -> None:
        swarm, said = MemorySwarm(), list[str]()
        one, two = await swarm.join("one"), await swarm.join("two")
        lender = Lender(one, folder, RESERVE + int(3.2 * weigh(folder)[1]), say=said.append)
        try:
            await lender.start(period=0.01, settle=0.01)
            loading = lender._load

            async def broken(chosen: tuple[int, int]) -> Segment:
                raise OSError("the disk is gone")

            assert lender.host is not None
            assert (lender.host.segment.first, lender.host.segment.last) == (0, 2)
            lender._load = broken  # type: ignore[method-assign]
            facts = {"model": lender.model, "depth": 4, "seconds": 1e-4}
            await two.announce({**facts, "first": 0, "last": 2})
            await _until(lambda: any("the disk is gone" in sentence for sentence in said))
            assert "one" in two.members(), "who cannot move goes on where it is"
            lender._load = loading  # type: ignore[method-assign]
            await _until(lambda: two.members()["one"]["first"] == 2)
        finally:
            await lender.close()
            await one.close()
            await two.close()

    asyncio.run(check())


@pytest.mark.parametrize("weights", ["mapped", "tiered(1)", "window(1)"])
def test_a_lender_without_memory_for_its_blocks_reads_them_and_says_the_same(folder: Path, weights: str) -> None:
    memory = RESERVE + int(4.6 * weigh(folder)[1])  # for three blocks of four, and sessions

    async def check() -> None:
        async with bench(folder, []) as made:
            member = await made.swarm.join("poor")
            lender = Lender(member, folder, memory, weights=weights)
            try:
                await lender.start(period=3600, settle=0.01)
                assert lender.host is not None
                assert (lender.host.segment.first, lender.host.segment.last) == (0, 4)
                assert await together(made.model, PROMPTS, COUNT) == [greedy(folder, prompt) for prompt in PROMPTS]
            finally:
                await lender.close()
                await member.close()

    asyncio.run(check())
    with pytest.raises(EngineError, match="fit"):
        asyncio.run(_lender(folder, memory, "window(4)"))
    with pytest.raises(GenerationError, match="--weights"):
        asyncio.run(_lender(folder, memory, "nf4"))


async def _lender(folder: Path, memory: int, weights: str) -> Lender:
    return Lender(await MemorySwarm().join("one"), folder, memory, weights=weights)


async def _until(holds: Any) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


def test_peers_that_do_not_answer_hold_up_nobody_who_forgets(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 2), (2, 4)]) as made:
            pipeline, loop = Pipeline(made.model, asyncio.get_running_loop()), asyncio.get_running_loop()
            session = pipeline.sessions[7] = Session()
            await made.model.step([Turn(session, PROMPTS[0])])
            closed = asyncio.Event()

            async def never(sender: str, verb: str, frame: bytes) -> bytes:
                closed.set()
                await asyncio.sleep(math.inf)
                return b""

            for host in made.hosts:
                host.peers.serve(never)
            started = loop.time()
            pipeline.forget(7)  # in the loop's own thread: had it waited, nothing would ever come
            await closed.wait()
            assert not pipeline.sessions
            assert loop.time() - started < 4.0
            for host in made.hosts:
                host.peers.serve(host.answer)
            assert await made.model.generate(PROMPTS[1], COUNT) == greedy(folder, PROMPTS[1])

    asyncio.run(check())


@pytest.mark.parametrize("sender", ["**", "door/**", "", "../door", "x" * 64, "Door"])
def test_a_call_in_a_name_that_nobody_can_have_is_not_answered(sender: str) -> None:
    async def check() -> None:
        swarm = MemorySwarm()
        member, called = await swarm.join("one"), list[str]()

        async def handler(who: str, verb: str, frame: bytes) -> bytes:
            called.append(who)
            return b""

        member.serve(handler)
        named = sender.encode()
        member._arrived(HEADER.pack(CALL, bytes(16), len(named), 4) + named + b"step")
        await asyncio.sleep(0.01)
        assert not called
        assert member.bytes_sent == 0
        await member.close()

    asyncio.run(check())
