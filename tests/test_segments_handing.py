"""Peers hand on to each other; where they cannot, or what comes late, changes no token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoders import decoder
from mycel.engines.calls import Ticket
from mycel.engines.peers_memory import MemoryPeers
from mycel.errors import EngineError, ParcelError
from mycel.segments.boundary import Boundary, Form
from mycel.segments.client import Turn
from mycel.segments.session import Session
from mycel.segments.steps import Forms, Reader, Step, Stop
from mycel.wire.parcel import Parcel
from swarms import bench
from test_segments import COUNT, PROMPTS, greedy, together


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    decoder("llama").save_pretrained(place)
    return place


def test_a_step_takes_one_call_from_its_owner_however_many_peers_there_are(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 1), (1, 3), (3, 4)]) as made:
            session = Session()
            await made.model.step([Turn(session, PROMPTS[0])])
            asked: list[str] = []
            ask = made.model.peers.ask

            def counted(peer: str, verb: str, frame: bytes) -> Ticket:
                asked.append(f"{verb} {peer}")
                return ask(peer, verb, frame)

            made.model.peers.ask = counted  # type: ignore[method-assign]
            for _ in range(4):
                await made.model.step([Turn(session, [5])])
            assert asked == ["step peer-0"] * 4
            assert [len(hop.inputs) for hop in session.hops] == [len(PROMPTS[0]) + 4] * 3
            assert not made.model.peers._waiting

    asyncio.run(check())


@pytest.mark.parametrize("silently", [False, True], ids=["it says so", "frames vanish"])
def test_neighbours_that_cannot_reach_each_other_are_asked_from_here(folder: Path, silently: bool) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 2), (2, 4)]) as made:
            first = made.member("peer-0")
            if silently:
                send = first._send
                first._send = lambda peer, frame: None if peer == "peer-1" else send(peer, frame)  # type: ignore[method-assign]
                made.model.patience = 2.0
                await together(made.model, PROMPTS, 1)  # half of it is waited before this one asks as well
                made.model.patience = 60.0  # from here on nothing is late but what a busy machine makes late
            else:
                present = MemoryPeers._present
                first._present = lambda peer: peer != "peer-1" and present(first, peer)  # type: ignore[method-assign]
            assert await together(made.model, PROMPTS, COUNT) == [greedy(folder, prompt) for prompt in PROMPTS]
            assert made.model.directory.apart == {("peer-0", "peer-1")}
            assert not made.model.pauses, "nobody was to blame"
            made.member("peer-1").kill()
            await made.lend("peer-2", 2, 4)
            assert not made.model.directory.apart

    asyncio.run(check())


def test_a_step_that_comes_after_a_later_one_is_refused(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 4)]) as made:
            model, forms = made.model, Forms()

            async def step(start: int, turn: int) -> None:
                stop, row = Stop("peer-0", 0, 4, ("s",)), torch.tensor([[start, 1, turn]])
                call = Step(model.model, (stop,), row, torch.ones(1, model.width), torch.empty(0, 16))
                await model.peers.call("peer-0", "step", forms.frame(model.boundary, call), 5.0)

            for turn in (1, 2, 3):
                await step(turn - 1, turn)
            with pytest.raises(EngineError, match="a later step"):
                await step(0, 1)
            assert made.hosts[0].segment.slab.lengths["s"] == 3
            await step(2, 3)  # the same again is no harm
            await step(1, 4)  # and a session can be taken back
            assert made.hosts[0].segment.slab.lengths["s"] == 2

    asyncio.run(check())


def test_a_call_that_comes_alone_is_answered_as_one_that_waits(folder: Path) -> None:
    async def check() -> None:
        async with bench(folder, [(0, 4)]) as made:
            host, forms = made.hosts[0], Forms()
            states = torch.randn(3, made.model.width, generator=torch.Generator().manual_seed(0))

            def frame(name: str, start: int) -> bytes:
                stop, row = Stop("peer-0", 0, 4, (name,)), torch.tensor([[start, 1, start + 1]])
                call = Step(made.model.model, (stop,), row, states[start : start + 1], torch.empty(0, 16))
                return forms.frame(made.model.boundary, call)

            for start in range(3):
                alone = host.at_once("door", "step", frame("a", start))
                assert alone == await host.answer("door", "step", frame("b", start))
            assert host.at_once("door", "echo", b"") is None
            assert Boundary.unpack(host.at_once("door", "step", frame("c", 2)), ("lost",)).kind == "lost"  # type: ignore[arg-type]

    asyncio.run(check())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**32 - 1), st.integers(0, 400))
def test_frames_of_a_form_are_parcels_and_damage_is_refused(rows: int, width: int, seed: int, at: int) -> None:
    source = torch.Generator().manual_seed(seed)
    hidden, form = torch.randn(rows, width, generator=source), Form("step", {"a": 1})
    tensors = {"hidden": hidden, "rows": torch.arange(3 * rows).view(rows, 3)}
    first, again = form.frame("raw", tensors), form.frame("raw", tensors)
    assert first == again == Parcel("step", {"a": 1, "codec": "raw"}, tensors).to_bytes()
    for _ in range(2):  # read anew, then from what is remembered
        found = Boundary.unpack(again, ("step",))
        assert found.header == {"a": 1, "codec": "raw"}
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    for damaged in (again[:-1], again + b"\0", again[: at % len(again)]):
        with pytest.raises(ParcelError):
            Boundary.unpack(damaged, ("step",))


def test_a_reader_checks_a_header_that_only_looks_like_one_it_knows() -> None:
    reader, rows = Reader(), torch.tensor([[0, 1, 1]])
    sound = {"model": "m", "stops": [["p", 0, 1, ["s"]]]}
    tensors = {"rows": rows, "hidden": torch.ones(1, 4)}
    assert reader.read(Parcel("step", sound, tensors), 4).stops[0].peer == "p"
    for header in ({**sound, "stops": [["p", 0, 1, ["s", "s"]]]}, {**sound, "model": 3}, {**sound, "stops": [[]]}):
        with pytest.raises(ParcelError):
            reader.read(Parcel("step", header, tensors), 4)
