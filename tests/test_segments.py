"""A model in pieces answers as the whole does: any cuts, many sessions, peers that leave, lie or dawdle."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from decoders import decoder
from mycel.errors import EngineError
from mycel.models.cut import Cut
from mycel.segments.client import SwarmModel, Turn
from mycel.segments.host import Host
from mycel.segments.segment import Row, Segment
from mycel.segments.session import Session
from swarms import bench

PROMPTS = [[5, 17, 9, 44], [7, 30, 12, 90, 4, 25, 33, 8], [61]]
COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    decoder("llama").save_pretrained(place)
    return place


def greedy(folder: Path, prompt: list[int], count: int = COUNT) -> list[int]:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    cache, ids, tokens = DynamicCache(config=model.config), torch.tensor([prompt]), list[int]()
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
    return tokens


async def together(model: SwarmModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    sessions = [Session() for _ in prompts]
    new, found = prompts, [list[int]() for _ in prompts]
    for _ in range(count):
        logits = await model.step([Turn(session, tokens) for session, tokens in zip(sessions, new, strict=True)])
        new = [[int(row)] for row in logits.argmax(-1)]
        for tokens, more in zip(found, new, strict=True):
            tokens += more
    await model.forget(sessions)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt-neo", "gemma3", "mistral", "qwen3"])
def test_rows_of_unequal_length_are_computed_as_if_alone(family: str) -> None:
    model = decoder(family)
    segment = Segment(Cut.of(model), 1, 3)
    assert segment.together == (family not in {"bloom", "gpt-neo", "gemma3", "mistral"})
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(length, segment.width, generator=generator) for length in (9, 5, 1)]
    with torch.inference_mode():
        whole = [segment.cut.run(state[None], 1, 3)[0] for state in states]
    names = ["a", "b", "c"]
    first = [Row(name, 0, len(state) - 1) for name, state in zip(names, states, strict=True) if len(state) > 1]
    segment.infer(torch.cat([state[:-1] for state in states]), first)
    last = [Row(name, len(state) - 1, 1) for name, state in zip(names, states, strict=True)]
    found = segment.infer(torch.cat([state[-1:] for state in states]), last)
    torch.testing.assert_close(found, torch.stack([state[-1] for state in whole]), rtol=1e-4, atol=1e-5)


def test_a_session_can_be_taken_back(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 2), (2, 4)]) as made:
            session = Session()
            right = await made.model.step([Turn(session, [5, 17, 9], wanted=3)])
            await made.model.step([Turn(session, [80, 81, 82])])
            again = await made.model.step([Turn(session, [17, 9], start=1, wanted=2)])
            torch.testing.assert_close(again, right[1:], rtol=1e-4, atol=1e-5)
            assert session.length == 3

    asyncio.run(check())


@pytest.mark.parametrize("ranges", [[(0, 4)], [(0, 1), (1, 4)], [(0, 3), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]])
def test_greedy_tokens_equal_the_whole_models(folder: Path, ranges: list[tuple[int, int]]) -> None:
    async def check() -> None:
        async with bench(folder, ranges) as made:
            assert await together(made.model, PROMPTS, COUNT) == [greedy(folder, prompt) for prompt in PROMPTS]
            assert not any(host.segment.slab.slots for host in made.hosts)

    asyncio.run(check())


def test_a_peer_that_is_killed_is_not_noticed_in_the_tokens(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 2), (2, 4), (0, 2), (2, 4)]) as made:
            sessions, new = [Session() for _ in PROMPTS], PROMPTS
            found = [list[int]() for _ in PROMPTS]
            for step in range(COUNT):
                if step in (3, 6):
                    victim = made.member(sessions[0].hops[step % 2].leg.peer)
                    victim.kill()
                logits = await made.model.step([Turn(s, t) for s, t in zip(sessions, new, strict=True)])
                new = [[int(row)] for row in logits.argmax(-1)]
                for tokens, more in zip(found, new, strict=True):
                    tokens += more
            assert found == [greedy(folder, prompt) for prompt in PROMPTS]
            assert len(made.model.pauses) == 2
            # Only the lost hop is rebuilt: each session sent its positions again once per loss, and no other hop's.
            assert [s.replayed for s in sessions] == [2 * len(p) + 3 - 1 + 6 - 1 + 2 for p in PROMPTS]

    asyncio.run(check())


class _Liar(Host):
    """Answers with something else once it is trusted."""

    how = "shape"
    calls = 0

    async def answer(self, sender: str, verb: str, frame: bytes) -> bytes:
        if verb == "step":
            self.calls += 1
            if self.calls > 4:
                return await self._lie(frame)
        return await super().answer(sender, verb, frame)

    async def _lie(self, frame: bytes) -> bytes:
        from mycel.segments.boundary import Boundary

        boundary = Boundary()
        if self.how == "slow":
            await asyncio.sleep(60)
        if self.how == "garbage":
            return b"\x07" * 900
        if self.how == "nan":
            count = len(Boundary.unpack(frame, ("step",)).tensors["hidden"])
            return boundary.pack("stepped", {}, hidden=torch.full((count, self.segment.width), torch.nan))
        if self.how == "lost":
            return boundary.pack("lost", {})
        return boundary.pack("stepped", {}, hidden=torch.zeros(3, 5))


@pytest.mark.parametrize("how", ["shape", "nan", "garbage", "slow", "lost"])
def test_peers_that_lie_or_dawdle_are_replaced(folder: Path, how: str) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 2)], patience=5.0) as made:
            liar = await made.lend("liar", 2, 4, type(f"Liar{how}", (_Liar,), {"how": how}))
            task = asyncio.create_task(together(made.model, PROMPTS, COUNT))
            while liar.calls < 3:  # type: ignore[attr-defined]
                await asyncio.sleep(0.001)
            await made.lend("honest", 2, 4)
            assert await task == [greedy(folder, prompt) for prompt in PROMPTS]
            assert made.model.directory.known["liar"].strikes

    asyncio.run(check())


def test_a_block_that_nobody_holds_is_named(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 2), (3, 4)], patience=0.2) as made:
            with pytest.raises(EngineError, match="no peer of the swarm holds block 2"):
                await made.model.generate(PROMPTS[0], 2)
            waiting = asyncio.create_task(made.model.generate(PROMPTS[0], COUNT))
            made.model.patience = 5.0
            await made.lend("late", 1, 4)
            assert await waiting == greedy(folder, PROMPTS[0])

    asyncio.run(check())


def test_codecs_cross_with_a_measured_error(folder: Path) -> None:
    async def crossed(codec: str) -> tuple[float, float, torch.Tensor]:
        async with bench(folder, [(0, 2), (2, 4)], codec=codec) as made:
            logits = await made.model.step([Turn(Session(), PROMPTS[1] * 4, wanted=32)])
            return made.model.boundary.sent, made.model.boundary.error, logits

    sent, error, exact = asyncio.run(crossed("raw"))
    assert error == 0
    for codec, share, bound in (("bf16", 0.75, 0.005), ("int8(32)", 0.6, 0.02), ("topk(0.5)", 1.0, 0.6)):
        fewer, found, logits = asyncio.run(crossed(codec))
        assert fewer < share * sent
        assert 0 < found < bound
        assert not torch.equal(logits, exact)


def test_malformed_calls_are_refused_and_change_nothing(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 4)]) as made:
            host, pack = made.hosts[0], made.model.boundary.pack
            model, stop, rows = made.model.model, ["peer-0", 0, 4, ["s"]], torch.tensor([[0, 2, 1]])
            hidden = torch.zeros(2, 32)

            def step(*stops: list[Any], **tensors: torch.Tensor) -> bytes:
                header = {"model": model, "stops": list(stops)}
                return pack("step", header, **{"hidden": hidden, "rows": rows, **tensors})

            bad = [
                b"",
                pack("other", {"model": model, "stops": [stop]}, hidden=hidden, rows=rows),
                pack("step", {"model": "else", "stops": [stop]}, hidden=hidden, rows=rows),
                step(),
                step(["peer-0", 0, 4, []], rows=torch.empty(0, 3, dtype=torch.int64)),
                step(["peer-0", 0, 4, ["s", "s"]], rows=rows.repeat(2, 1), hidden=hidden.repeat(2, 1)),
                step(["peer-0", 0, 9, ["s"]]),
                step(stop, rows=torch.tensor([[-1, 2, 1]])),
                step(stop, rows=torch.tensor([[0, 1 << 30, 1]])),
                step(stop, rows=rows.float()),
                step(stop, hidden=torch.zeros(2, 31)),
                step(stop, hidden=torch.full((2, 32), torch.inf)),
                step(stop, ["peer-1", 4, 6, ["s"]]),
                step(stop, ["peer-1", 5, 6, ["s"]], numbers=torch.zeros(1, 16, dtype=torch.uint8)),
                pack("backward", {"session": "s", "shape": [1, 2]}, gradient=torch.zeros(1, 2, 32)),
            ]
            for frame in bad:
                verb = "backward" if b"backward" in frame else "step"
                with pytest.raises(EngineError, match="refuses"):
                    await made.model.peers.call("peer-0", verb, frame, 5.0)
            assert not host.segment.slab.slots
            assert await made.model.generate(PROMPTS[0], 3) == greedy(folder, PROMPTS[0], 3)

    asyncio.run(check())
